"""Incidents told to a URL of the operator's, as JSON by POST."""

from typing import Any

import httpx

from recovery.errors import WebhookError

TIMEOUT_S = 5.0


class HttpWebhook:
    """One URL. Its address may hold a secret, so no error repeats it."""

    def __init__(self, url: str) -> None:
        self._url = url

    def tell(self, message: dict[str, Any]) -> None:
        """Post the message; raise `WebhookError` unless it was answered with 2xx."""
        try:
            status = httpx.post(self._url, json=message, timeout=TIMEOUT_S).status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise WebhookError(f"cannot tell the webhook (RECOVERY_WEBHOOK_URL): {type(error).__name__}") from None
        if not 200 <= status < 300:
            raise WebhookError(f"cannot tell the webhook (RECOVERY_WEBHOOK_URL): it answered {status}")
