"""Where finished runs are read from: folders, studies, MLflow."""
