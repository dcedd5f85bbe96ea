"""For authors: notebooks made from a lesson's two files, and the gates that each lesson passes."""
