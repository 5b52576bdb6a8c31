"""Calls of a deployment whose arguments and results may hold references, and what becomes of their errors."""

import asyncio
import time
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.ray_serve.failures import translated
from deployments.ray_serve.handoff import by_reference, cancel
from deployments.ray_serve.refusals import abandoned, checked, was_cancelled
from deployments.turns import Turns
from engine.errors import Overloaded, SightlineError


class Remote:
    """A deployment behind ``handle``, whose calls may hold references.

    Attributes:
        name: the deployment's, in words.
    """

    name: str

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = by_reference(handle)
        self._turns = Turns()

    async def _result(self, response: Any) -> Any:
        """The result of a call. No frame keeps its arguments: an answer may last.

        Raises:
            SightlineError: the method refused, or the replica or the call failed.
        """
        try:
            return checked(await response)
        except asyncio.CancelledError:
            # Serve itself would not stop the replica.
            cancel(response)
            if was_cancelled():
                raise
            raise abandoned() from None
        except SightlineError:
            raise
        except Exception as error:
            raise self._reported(error) from error
        finally:
            # A cycle otherwise: the response keeps its error, whose traceback keeps this frame.
            del response

    async def _work(self, response: Any) -> Any:
        """The result of a call that does the work of a request; errors as :meth:`_result`."""
        call = self._result(response)
        del response
        result = await call
        self._ended()
        return result

    def _ended(self) -> None:
        """Count work that has ended: at that rate the deployment has room again."""
        self._turns.ended(time.monotonic())

    def _reported(self, error: Exception) -> SightlineError:
        """The error to report for that of a call."""
        reported = translated(error, self.name)
        if isinstance(reported, Overloaded):
            reported.retry_after_s = self._turns.book(time.monotonic())
        return reported
