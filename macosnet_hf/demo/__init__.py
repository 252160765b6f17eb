"""The Gradio demo: page, tabs, endpoints, viewer, result store."""
