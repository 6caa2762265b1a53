"""Between text and logits: tokenizer, chat templates, streams, stop strings, sampling. Knows no weights."""
