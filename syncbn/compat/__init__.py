"""The same layers under other libraries' names and plugins; nothing here is imported unless asked for."""
