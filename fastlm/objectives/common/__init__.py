"""What objectives share: tasks, where models come from, examples of text and of tables."""
