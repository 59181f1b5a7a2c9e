"""What messages, logs and series of readings say about memory."""
