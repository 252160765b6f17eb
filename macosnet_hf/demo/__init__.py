"""The Gradio demo: the page and its tabs, the public endpoints, the viewer, the result store and the server."""
