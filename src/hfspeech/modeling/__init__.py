"""What is changed inside the models to make them fast; classes, weights and their names stay transformers' own."""
