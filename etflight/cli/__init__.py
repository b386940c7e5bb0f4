"""The command line, and a one-line description of each command."""

STAGES = {
    "fit": "Train a classifier.",
    "validate": "Measure a trained classifier on the validation images.",
    "test": "Measure a trained classifier on the test images.",
    "predict": "Write a trained classifier's decisions on the test images, or on any others (--images).",
}
OTHERS = {
    "describe": "Show what a data set holds.",
    "configs": "List the configuration files that come with etflight, or copy them.",
    "study": "Train and test arms over sets, ratios and seeds, and print their table.",
    "report": "Show results of runs side by side, in a table or on a page.",
    "collapse": "Measure neural collapse of a trained model.",
    "retrieval": "Search images with one model among those of another.",
    "ood": "Measure how well a trained model tells unknown classes from its own.",
    "incremental": "Teach a trained model new classes from a few images each, session by session.",
    "export": "Write a trained model for programs that do not know etflight.",
    "dashboard": "Build a workspace and a report in a W&B project.",
}
