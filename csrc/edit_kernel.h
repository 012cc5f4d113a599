#pragma once

#include "mix.h"

namespace personasteer {

// The edit of one token at block il, in place: x holds the block's output h [n_embd] and gets h'. The same numbers
// come out whatever else is in the batch, and on every CPU: sums run over sixteen lanes in a fixed order, and products
// are rounded before they are added. A term that does nothing leaves x as it is, bit for bit.
void edit_token(const mix & m, int il, int j, float * x);

// out[r] = <h, u_r> for n directions that lie one behind the other
void read_token(const float * directions, int n, int n_embd, const float * h, float * out);

} // namespace personasteer
