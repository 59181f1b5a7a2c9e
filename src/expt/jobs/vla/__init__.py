"""Vision-language-action: a backbone that sees and reads, and an expert that acts."""
