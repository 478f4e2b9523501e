"""What MLflow runs to get the model: see pyfunc.py. Never imported by the project, for it acts when it is."""

from mlflow.models import set_model

from pipeline.pretrained.pyfunc import TextModel

set_model(TextModel())
