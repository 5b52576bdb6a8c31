"""openai-python 3."""

from tests.clients.environment import needs

needs("openai==3.54.0")

from tests.clients.openai_parsed import *  # noqa: E402, F403
from tests.clients.openai_uses import *  # noqa: E402, F403
