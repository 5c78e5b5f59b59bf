"""The study in a browser. One page, no script from elsewhere, works with the keyboard and on a phone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.errors import UsageError, WriteError
from loraclr.web.study import SCALE, Study, new_rater

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.serving import BaseWSGIServer
    from werkzeug.wrappers import Response

COOKIE = "rater"


def make_app(study: Study) -> Flask:
    """Routes: / (the next question, or thanks), /answer (one rating), /back, /pictures/NAME."""
    from flask import Flask, abort, make_response, redirect, render_template, request, send_from_directory

    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    pictures = {question.picture for question in study.questions} | {name for one in study.questions for name in one.references}

    def rater() -> str | None:
        given = request.cookies.get(COOKIE, "")
        return given if re.fullmatch("[0-9a-f]{32}", given) else None

    def remembered(response: Response, who: str) -> Response:
        response.set_cookie(COOKIE, who, max_age=90 * 24 * 3600, httponly=True, samesite="Strict")
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/")
    def show() -> Response:
        who = rater()
        if who is None:
            cookieless = "start" in request.args
            page = render_template("study.html", study=study, state="welcome", total=len(study.questions), cookieless=cookieless)
            return remembered(make_response(page), new_rater())
        try:
            answered, order = study.answered(who), study.order(who)
        except WriteError as error:
            abort(503, f"The study cannot go on: {error}")
        asked = request.args.get("question")
        if asked is None and not answered and "start" not in request.args:
            return remembered(make_response(render_template("study.html", study=study, state="welcome", total=len(order))), who)
        question = next((one for one in order if one.id == asked), None) or next((one for one in order if one.id not in answered), None)
        if question is None:
            return remembered(make_response(render_template("study.html", study=study, state="done", total=len(order))), who)
        place = order.index(question)
        page = render_template(
            "study.html",
            study=study,
            state="question",
            question=question,
            given=answered.get(question.id),
            done=len(answered),
            total=len(order),
            previous=order[place - 1].id if place else None,
            scale=SCALE,
        )
        return remembered(make_response(page), who)

    @app.post("/answer")
    def answer() -> Response:
        who = rater()
        if who is None:
            abort(400, "This browser keeps no cookies for the study, so an answer could not be told from another person's.")
        try:
            study.answer(who, request.form.get("question", ""), int(request.form.get("rating", "0")))
        except (UsageError, ValueError) as error:
            abort(400, str(error))
        except WriteError as error:
            abort(503, f"The answer was not kept: {error}")
        return redirect("/", 303)

    @app.get("/pictures/<name>")
    def picture(name: str) -> Response:
        if name not in pictures:
            abort(404)
        return send_from_directory(study.folder.resolve() / "pictures", name, max_age=3600)

    return app


def make_server(study: Study, *, host: str = "127.0.0.1", port: int = 8765) -> BaseWSGIServer:
    """A server ready for `serve_forever`; port 0 takes a free one. Raises UsageError where the address cannot be bound."""
    from werkzeug.serving import make_server as make

    try:
        return make(host, port, make_app(study), threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug exits where a port is taken
        raise UsageError(f"cannot listen on {host}:{port}: it is taken or not allowed; give another --port") from error
