// FASTGPT_FIELDS(a, b, ...) gives a parameter struct a `visit(f)` that calls f("a", a), f("b", b), ...
// It is the only reflection the bindings need to fill a struct from keyword arguments.
#pragma once

#define FASTGPT_PARENS ()
#define FASTGPT_EXPAND(...) FASTGPT_EXPAND3(FASTGPT_EXPAND3(FASTGPT_EXPAND3(FASTGPT_EXPAND3(__VA_ARGS__))))
#define FASTGPT_EXPAND3(...) FASTGPT_EXPAND2(FASTGPT_EXPAND2(FASTGPT_EXPAND2(FASTGPT_EXPAND2(__VA_ARGS__))))
#define FASTGPT_EXPAND2(...) FASTGPT_EXPAND1(FASTGPT_EXPAND1(FASTGPT_EXPAND1(FASTGPT_EXPAND1(__VA_ARGS__))))
#define FASTGPT_EXPAND1(...) __VA_ARGS__
#define FASTGPT_VISIT_EACH(field, ...) \
  visitor(#field, field);              \
  __VA_OPT__(FASTGPT_VISIT_AGAIN FASTGPT_PARENS(__VA_ARGS__))
#define FASTGPT_VISIT_AGAIN() FASTGPT_VISIT_EACH

#define FASTGPT_FIELDS(...)                         \
  template <class Visitor>                          \
  void visit(Visitor&& visitor) {                   \
    FASTGPT_EXPAND(FASTGPT_VISIT_EACH(__VA_ARGS__)) \
  }
