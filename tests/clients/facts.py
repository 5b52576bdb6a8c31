"""The class of an answer about an image, for clients that take classes. It is imported behind ``needs``: not
every environment of a client has pydantic."""

from pydantic import BaseModel


class Facts(BaseModel):
    color: str
    shape: str
    count: int
