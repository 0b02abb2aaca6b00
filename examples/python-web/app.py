"""A small Flask app: says who serves it."""

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def index() -> str:
    return f"Hello from {os.environ['DYNO']}, uid {os.getuid()}, pid {os.getpid()}.\n"
