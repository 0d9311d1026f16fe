// Parts of the module that stand in files of their own.
#pragma once

#include <nanobind/nanobind.h>

void bind_recent(nanobind::module_& m);
void bind_step(nanobind::module_& m);
