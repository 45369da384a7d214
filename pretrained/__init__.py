"""What this project trained itself: a folder a model, with its checkpoint and its bundle."""
