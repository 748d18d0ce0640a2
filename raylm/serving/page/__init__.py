"""The web chat page: Gradio's components, our requests to the server's OpenAI routes, and the guard around both."""
