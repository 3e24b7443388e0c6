"""From a model to an artifact: the only room that knows a Plan."""

from diffc.compile.plan import CompileRequest, Plan, check, check_targets
from diffc.compile.spine import CompileResult, compile_model

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]
