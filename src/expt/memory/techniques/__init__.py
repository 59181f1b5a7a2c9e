"""What makes a training take less memory, and how it is put on a model."""
