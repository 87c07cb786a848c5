"""Between text and tokens: tokenizers, the chat layout, and tool calls."""
