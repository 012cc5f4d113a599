#include "arrays.h"
#include "errors.h"
#include "gguf_file.h"
#include "requantize.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace py::literals;
using personasteer::float_array;

static gguf_type to_type(int n) {
    if (n < 0 || n > GGUF_TYPE_COUNT) {
        throw personasteer::argument_error("a key-value has no type " + std::to_string(n));
    }
    return gguf_type(n);
}

static personasteer::gguf_field to_field(const py::tuple & t) {
    personasteer::gguf_field f;
    f.key = t[0].cast<std::string>();
    f.type = to_type(t[1].cast<int>());
    f.element = to_type(t[2].cast<int>());
    if (py::isinstance<py::bytes>(t[3])) {
        f.bytes = t[3].cast<std::string>();
    } else {
        f.texts = t[3].cast<std::vector<std::string>>();
    }
    return f;
}

void bind_gguf(py::module_ & m) {
    m.def(
        "summarize_gguf",
        [](const std::string & path) {
            personasteer::gguf_summary s;
            {
                const py::gil_scoped_release release;
                s = personasteer::summarize_gguf(path);
            }
            py::list tensors;
            for (const auto & t : s.tensors) {
                tensors.append(py::make_tuple(py::bytes(t.name), t.type, t.shape, t.offset, t.n_bytes));
            }
            return py::make_tuple(py::bytes(s.architecture), py::bytes(s.metadata), tensors);
        },
        "path"_a, "(architecture, metadata, [(name, type, shape, offset, n_bytes)]) of a GGUF file, texts as bytes.");

    m.def(
        "read_gguf_fields",
        [](const std::string & path) {
            std::vector<personasteer::gguf_field> fields;
            {
                const py::gil_scoped_release release;
                fields = personasteer::read_gguf_fields(path);
            }
            py::list out;
            for (const auto & f : fields) {
                py::object value = py::bytes(f.bytes);
                if (f.element == GGUF_TYPE_STRING) {
                    py::list texts;
                    for (const std::string & text : f.texts) {
                        texts.append(py::bytes(text));
                    }
                    value = texts;
                }
                out.append(py::make_tuple(py::bytes(f.key), int(f.type), int(f.element), value));
            }
            return out;
        },
        "path"_a, "[(key, type, element type, bytes or list of texts)] of a GGUF file, texts as bytes.");

    m.def("check_model_metadata", &personasteer::check_model_metadata, "path"_a,
          py::call_guard<py::gil_scoped_release>(),
          "Raises ModelError where llama.cpp would end the process over what a model file says.");
    m.def("check_adapter_metadata", &personasteer::check_adapter_metadata, "path"_a,
          py::call_guard<py::gil_scoped_release>(), "The same of a LoRA adapter.");

    m.def(
        "change_gguf_header",
        [](const std::string & path, const std::vector<std::string> & removed, const std::vector<py::tuple> & fields,
           const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>> & tensors) {
            std::vector<personasteer::gguf_field> values;
            for (const py::tuple & t : fields) {
                values.push_back(to_field(t));
            }
            std::vector<personasteer::gguf_new_tensor> added;
            for (const auto & [name, type, shape] : tensors) {
                added.push_back({name, type, shape});
            }
            personasteer::gguf_header h;
            {
                const py::gil_scoped_release release;
                h = personasteer::change_gguf_header(path, removed, values, added);
            }
            return py::make_tuple(py::bytes(h.bytes), h.data_offset, h.n_data, h.offsets, h.alignment);
        },
        "path"_a, "removed"_a, "fields"_a, "tensors"_a,
        "(header, data offset in the old file, its data's size, offsets of the new tensors, alignment) of a file with "
        "other key-values (key, type, element type, bytes or texts) and more tensors (name, type, shape).");

    m.def(
        "dequantize",
        [](const std::string & type, const py::bytes & data, int64_t n_per_row) {
            const std::string rows = data;
            std::vector<float> out;
            {
                const py::gil_scoped_release release;
                out = personasteer::dequantize(personasteer::type_named(type), rows, n_per_row);
            }
            const auto n_rows = py::ssize_t(out.size()) / py::ssize_t(n_per_row);
            return personasteer::to_array(std::move(out), {n_rows, py::ssize_t(n_per_row)});
        },
        "type"_a, "data"_a, "n_per_row"_a, "Whole rows of a tensor as (rows, n_per_row) float32.");

    m.def(
        "quantize",
        [](const std::string & type, const float_array & rows, const float_array & importance) {
            if (rows.ndim() != 2) {
                throw personasteer::argument_error("rows to quantize must be 2D, not " + std::to_string(rows.ndim()) +
                                                   "D");
            }
            const std::vector<float> columns = personasteer::to_vector(importance);
            const float * data = rows.data();
            const int64_t n_rows = rows.shape(0), n_per_row = rows.shape(1);
            std::string out;
            {
                const py::gil_scoped_release release;
                out = personasteer::quantize(personasteer::type_named(type), data, n_rows, n_per_row, columns);
            }
            return py::bytes(out);
        },
        "type"_a, "rows"_a, "importance"_a,
        "Rows (n, n_per_row) in a tensor's type; importance (n_per_row,) or empty.");
}
