"""Vision-language models of transformers, trained on what is said about pictures."""
