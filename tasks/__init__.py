"""What chat_eval asks, one data set a file."""
