"""An OpenAI-compatible server in which every request has its own mix of vectors.

`personasteer serve -m MODEL -v NAME=FILE` starts one; `personasteer.serve.app.create_app` is the ASGI application
behind it. Nothing is imported here: the worker process needs no web server.
"""
