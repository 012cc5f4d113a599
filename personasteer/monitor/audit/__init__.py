"""One look at a whole model: what it is, what character it has, what changed; a log, and a page made of it."""

from personasteer.monitor.audit.log import read_audit
from personasteer.monitor.audit.measure import audit_model, load_earlier
from personasteer.monitor.audit.page import render_audit, write_audit

__all__ = ["audit_model", "load_earlier", "read_audit", "render_audit", "write_audit"]
