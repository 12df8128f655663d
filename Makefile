# make              train_gdn: with CUDA where nvcc is found, else for the CPU alone
# make test         builds and runs the tests; those that need a GPU are skipped by name where there is none
# make sanitize     compute-sanitizer (memcheck, racecheck) over the GPU tests
# make bench        benchmarks of the kernels and of the training step (needs a GPU)
# make train_gdn_readable, make test_gdn_readable
#                   the same programs with the GPU layers of dev/readable: float throughout, written to be read
# make gpu-check    says which GPU, compiler and libraries the build found
# make clean
#
# Settings: NVCC= (empty: build without CUDA), GPU_ARCH=90a (default: the GPU present, else 80 with PTX for newer
# ones), OPENBLAS=no (own loops for the CPU's matrix products), MARCH=native, CXX=g++.

CXX ?= g++
MARCH ?= native
ifeq ($(shell command -v $(CXX)),)
$(error $(CXX) is not installed: apt-get install g++ libopenblas-dev)
endif
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
HASH := \#
OPENBLAS ?= $(shell printf '$(HASH)include <cblas.h>\nint main() { openblas_set_num_threads(1); }\n' | \
  $(CXX) -x c++ - -o /dev/null -lopenblas 2>/dev/null && echo yes || echo no)
DOCTEST := $(shell printf '$(HASH)include <doctest/doctest.h>\n' | $(CXX) -x c++ -E - >/dev/null 2>&1 && echo yes || echo no)

WARNINGS := -Wall -Wextra
CXXFLAGS := -std=c++17 -O3 -march=$(MARCH) -fno-math-errno -fno-trapping-math -fopenmp
LIBS :=
ifeq ($(OPENBLAS),yes)
CXXFLAGS += -DGDN_OPENBLAS
LIBS += -lopenblas
endif

ifeq ($(NVCC),)
COMPILE = $(CXX) $(CXXFLAGS) $(WARNINGS) -x c++
LINK_LIBS = -x none $(LIBS)
else
GPU_FOUND := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | grep -E '^[0-9]+$$')
GPU_ARCH ?= $(if $(GPU_FOUND),$(subst 90,90a,$(GPU_FOUND)),80)
GENCODE := -gencode=arch=compute_$(GPU_ARCH),code=sm_$(GPU_ARCH)
ifeq ($(GPU_ARCH),80)
GENCODE += -gencode=arch=compute_80,code=compute_80
endif
# 1675: nvcc does not know a pragma that it passes on to the host's compiler
comma := ,
empty :=
space := $(empty) $(empty)
COMPILE = $(NVCC) -std=c++17 -O3 -diag-suppress 1675 $(GENCODE) -ccbin $(CXX) -x cu \
  -Xcompiler $(subst $(space),$(comma),$(strip $(filter-out -std=c++17 -O3 -DGDN_OPENBLAS,$(CXXFLAGS)) $(WARNINGS))) \
  $(filter -DGDN_OPENBLAS,$(CXXFLAGS))
LINK_LIBS = $(LIBS) -lcublasLt
endif

HEADERS := $(wildcard *.h *.cuh gdn/*.h gdn/*.cuh gdn/kernels/*.cuh dev/readable/*.cuh)
TESTS := $(wildcard gdn/tests/*.h)

.PHONY: all test sanitize bench gpu-check clean doctest
all: train_gdn

train_gdn: train_gdn.cu $(HEADERS) Makefile
	$(COMPILE) $< -o $@ $(LINK_LIBS)

test_gdn: test_gdn.cu $(HEADERS) $(TESTS) Makefile | doctest
	$(COMPILE) -I. $< -o $@ $(LINK_LIBS)

train_gdn_readable: train_gdn.cu $(HEADERS) Makefile
	$(if $(NVCC),,$(error make $@ needs nvcc))
	$(COMPILE) -DGDN_READABLE $< -o $@ $(LINK_LIBS)

test_gdn_readable: test_gdn.cu $(HEADERS) $(TESTS) Makefile | doctest
	$(if $(NVCC),,$(error make $@ needs nvcc))
	$(COMPILE) -DGDN_READABLE -I. $< -o $@ $(LINK_LIBS)

doctest:
ifneq ($(DOCTEST),yes)
	@echo "make: the tests need doctest: apt-get install doctest-dev" >&2; exit 1
endif

test: train_gdn test_gdn
	./test_gdn

# The layers' tests and one of the whole model; the test that runs out of memory means to. racecheck takes the barriers
# inside cuBLASLt's own kernels (nvjet...) for races, so it leaves out the tests with matrix products.
SANITIZED := --test-case='cuda:*,cuda delta rule*,*the same seed gives the same bits' --test-case-exclude='*out of memory*'
RACECHECKED := --test-case='cuda:*,cuda delta rule*' --test-case-exclude='*out of memory*,*linear*'
sanitize: test_gdn
	compute-sanitizer --tool memcheck --error-exitcode 1 ./test_gdn $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 ./test_gdn $(RACECHECKED)

bench: dev/bench_layers dev/bench_delta_rule dev/bench_step
	./dev/bench_layers
	./dev/bench_delta_rule
	./dev/bench_step -phases

dev/bench_%: dev/bench_%.cu $(HEADERS) $(wildcard dev/*.h) Makefile
	$(if $(NVCC),,$(error make bench needs nvcc and a GPU))
	$(COMPILE) -I. -I$(dir $(NVCC))../extras/CUPTI/include $< -o $@ $(LINK_LIBS)

# reads numbers from a file, for dev/torch/accuracy.py; without nvcc for the CPU alone
dev/delta_rule_file: dev/delta_rule_file.cu $(HEADERS) Makefile
	$(COMPILE) -I. $< -o $@ $(LINK_LIBS)

gpu-check:
	@echo "nvcc: $(or $(NVCC),not found: builds for the CPU alone)"
	@echo "OpenBLAS: $(OPENBLAS), doctest: $(DOCTEST)"
	@nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader 2>/dev/null || echo "GPU: none"

clean:
	rm -f train_gdn test_gdn train_gdn_readable test_gdn_readable dev/bench_layers dev/bench_delta_rule dev/bench_step dev/delta_rule_file
