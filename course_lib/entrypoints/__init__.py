"""What people call: `LLM`, the command line and (later) the OpenAI server."""
