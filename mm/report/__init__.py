"""`mm report RUN_DIR`: one self-contained HTML page that shows what a run did and how good the result is."""
