"""The HTTP service: OpenAI's completions and chat, health, metrics and a page. Needs the extra `serve`."""
