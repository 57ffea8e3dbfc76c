"""Base class and field types that all config models share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.storage.store import absolute_url

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]
# A folder or a URL. Local paths become absolute, because workers may run in another working directory.
Location = Annotated[str, AfterValidator(absolute_url)]


class StrictConfig(BaseModel):
    """A frozen model that refuses unknown keys, infinities, NaN, and booleans where another type is expected.

    The string below each field is its description in the reference documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `workers=true` as the number 1.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("expected a non-boolean value")
        return value
