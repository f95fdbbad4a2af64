"""What gunicorn serves."""

import sys

from gunicorn.arbiter import Arbiter

from app import create_app
from services.config import ConfigError
from services.state_folder import StateError
from services.store.errors import StoreError

try:
    app = create_app()
except (ConfigError, StateError, StoreError) as error:
    print(error, file=sys.stderr)
    sys.exit(Arbiter.APP_LOAD_ERROR)
