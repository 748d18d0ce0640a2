"""serve run serve.chat:app model=runs/sft/export"""

from ray.serve import Application

from raylm.serving import ServeArgs, build_app


def app(args: ServeArgs) -> Application:
    """Serve reads the annotation and validates the arguments with it."""
    return build_app(args)
