"""What will be compared: documents, queries, and for each query the candidates that judges will see."""
