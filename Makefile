# make              train_gdn: with CUDA where nvcc is found, else for the CPU alone
# make test         builds and runs the tests; those that need a GPU are skipped by name where there is none
# make sanitize     compute-sanitizer (memcheck, racecheck) over the GPU tests
# make libgdn.so    the layers as C functions (gdn/library.h), for PyTorch (scripts/gdn_torch.py) and others
# make bench        times of the kernels and of the training step beside the card's baseline (needs a GPU)
# make debug        build/debug/train_gdn and test_gdn, for a debugger
# make ci           what a clean machine does (.ci/run): packages, builds without and with nvcc, all tests
# make format       clang-format over the C++ and CUDA files
# make gpu-check    says which GPU, compiler and libraries the build found
# make clean
#
# Settings: NVCC= (empty: build without CUDA), GPU_ARCH=90a (default: the GPU present, else 80 with PTX for newer
# ones), MPI=no, NCCL=no (several ranks: found where they are installed), MARCH=native, CXX=g++, EXTRA= (more flags, for
# both compilers). make uses all cores unless -j says otherwise, compiles what a change touches, and everything again where a
# setting or a library it found has changed.

ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc)
endif
CXX ?= g++
MARCH ?= native
ifeq ($(shell command -v $(CXX)),)
$(error $(CXX) is not installed: apt-get install g++)
endif
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
HASH := \#
# several ranks: MPI for the host, NCCL for what lies on GPUs
MPI_COMPILE := $(shell mpicc --showme:compile 2>/dev/null || mpicc -compile_info 2>/dev/null | cut -d ' ' -f 2-)
MPI_LINK := $(shell mpicc --showme:link 2>/dev/null || mpicc -link_info 2>/dev/null | cut -d ' ' -f 2-)
MPI ?= $(shell printf '$(HASH)include <mpi.h>\nint main() { return MPI_Finalize(); }\n' | \
  $(CXX) -DOMPI_SKIP_MPICXX -x c++ - -o /dev/null $(MPI_COMPILE) $(MPI_LINK) 2>/dev/null && echo yes || echo no)
DOCTEST := $(shell printf '$(HASH)include <doctest/doctest.h>\n' | $(CXX) -x c++ -E - >/dev/null 2>&1 && echo yes || echo no)

BUILD := build
PROGRAMS := .
CXXFLAGS := -std=c++17 -O3 -march=$(MARCH) -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra
DEPENDENCIES := -MMD -MP
COMPILE_CXX = $(CXX) $(CXXFLAGS) -I. $(DEFINES) $(DEPENDENCIES) $(EXTRA) -x c++ -c
LIBS :=
ifeq ($(MPI),yes)
DEFINES += -DGDN_MPI $(patsubst -I%,-isystem %,$(MPI_COMPILE))
LIBS += $(MPI_LINK)
endif

ifeq ($(NVCC),)
NCCL := no
LINK = $(CXX) $(CXXFLAGS) $(EXTRA)
else
GPU_FOUND := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | grep -E '^[0-9]+$$')
GPU_ARCH ?= $(if $(GPU_FOUND),$(subst 90,90a,$(GPU_FOUND)),80)
GENCODE := -gencode=arch=compute_$(GPU_ARCH),code=sm_$(GPU_ARCH)
ifeq ($(GPU_ARCH),80)
GENCODE += -gencode=arch=compute_80,code=compute_80
endif
# where nvcc takes CUDA's headers from, for the files that the C++ compiler compiles
CUDA_INCLUDES := $(patsubst -I%,-isystem %,$(shell $(NVCC) -dryrun -x cu -c /dev/null 2>&1 | sed -n 's/.* INCLUDES="\([^"]*\)".*/\1/p'))
DEFINES += -DGDN_CUDA $(CUDA_INCLUDES)
# Machine code with line numbers is three times as large as without, and compressed smaller than either. Drivers that
# run what nvcc 13 builds can decompress it; those for older ones may not.
COMPRESS := $(if $(shell $(NVCC) --version | grep -E 'release (1[3-9]|[2-9][0-9])'),--compress-mode=size)
# 1675: nvcc does not know a pragma that it passes on to the host's compiler
COMPILE_NVCC = $(NVCC) -ccbin $(CXX) -forward-unknown-to-host-compiler -diag-suppress 1675 -lineinfo $(COMPRESS) $(GENCODE) \
  $(CXXFLAGS) -fPIC -fvisibility=hidden -I. -I$(dir $(NVCC))../extras/CUPTI/include $(DEFINES) $(DEPENDENCIES) $(EXTRA) -c
LINK = $(NVCC) -ccbin $(CXX) -forward-unknown-to-host-compiler $(GENCODE) $(CXXFLAGS) $(EXTRA)
LIBS += -lcublasLt
NCCL ?= $(shell printf '$(HASH)include <nccl.h>\nint main() { int v; return ncclGetVersion(&v); }\n' | \
  $(CXX) -x c++ - -o /dev/null $(CUDA_INCLUDES) -L$(dir $(NVCC))../lib64 -lnccl 2>/dev/null && echo yes || echo no)
ifeq ($(NCCL),yes)
DEFINES += -DGDN_NCCL
LIBS += -lnccl
endif
endif

# ---- what the programs are made of: objects in build/, one for each .cpp and .cu file

objects = $(patsubst %,$(BUILD)/%.o,$(basename $(1)))
TESTS := $(call objects,test_gdn.cu $(wildcard gdn/tests/*.cpp))
RANKS := $(BUILD)/gdn/communicator.o
ifneq ($(NVCC),)
HEAD_DIMS := 32 64 96 128 192 256
PASSES := $(HEAD_DIMS:%=$(BUILD)/gdn/kernels/delta_rule/delta_rule_head_dim_%.o)
RANKS += $(BUILD)/gdn/communicator_cuda.o
LAYERS := $(PASSES) $(filter-out %/delta_rule_head_dim.o,$(call objects,$(wildcard gdn/*.cu gdn/kernels/*.cu gdn/kernels/*/*.cu)))
TESTS += $(call objects,$(wildcard gdn/tests/*.cu))
else
TESTS := $(filter-out $(BUILD)/gdn/tests/test_cuda_%,$(TESTS))
endif
# host code alone, whatever the name says
HOST_CODE := $(call objects,train_gdn.cu test_gdn.cu dev/bench_step.cu dev/bench_overlap.cu dev/delta_rule_file.cu)

.PHONY: all test sanitize bench debug ci format gpu-check clean doctest force
all: $(PROGRAMS)/train_gdn

$(PROGRAMS)/train_gdn: $(BUILD)/train_gdn.o $(BUILD)/gdn/version.o $(RANKS) $(LAYERS)
	$(LINK) $^ -o $@ $(LIBS)

$(PROGRAMS)/test_gdn: $(TESTS) $(BUILD)/gdn/library.o $(RANKS) $(LAYERS)
	$(LINK) $^ -o $@ $(LIBS)

# the layers for other programs: only the functions of gdn/library.h are visible
$(PROGRAMS)/libgdn.so: $(BUILD)/gdn/library.o $(LAYERS)
	$(LINK) -shared $^ -o $@ $(LIBS)

# The compilers' commands as files: newer than the objects where a setting has changed.
COMMANDS := $(BUILD)/COMPILE_CXX $(BUILD)/COMPILE_NVCC
$(COMMANDS): $(BUILD)/%: force
	@mkdir -p $(BUILD)
	@echo '$($*)' | cmp -s - $@ || echo '$($*)' >$@

$(BUILD)/%.o: %.cpp $(BUILD)/COMPILE_CXX
	@mkdir -p $(@D)
	$(COMPILE_CXX) $< -o $@

$(HOST_CODE): $(BUILD)/%.o: %.cu $(BUILD)/COMPILE_CXX
	@mkdir -p $(@D)
	$(COMPILE_CXX) $< -o $@

$(BUILD)/%.o: %.cu $(BUILD)/COMPILE_NVCC
	@mkdir -p $(@D)
	$(COMPILE_NVCC) $< -o $@

$(PASSES): $(BUILD)/gdn/kernels/delta_rule/delta_rule_head_dim_%.o: gdn/kernels/delta_rule/delta_rule_head_dim.cu $(BUILD)/COMPILE_NVCC
	@mkdir -p $(@D)
	$(COMPILE_NVCC) -DGDN_HEAD_DIM_K=$* $< -o $@

# what --version says: compiled again where the commit has changed
COMMIT := $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
VERSION = -DGDN_COMMIT='"$(COMMIT)"' $(if $(NVCC),-DGDN_GPU_CODE='"sm_$(GPU_ARCH)"')
$(BUILD)/COMMIT: force
	@mkdir -p $(BUILD)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' >$@
$(BUILD)/gdn/version.o: gdn/version.cpp $(BUILD)/COMMIT $(BUILD)/COMPILE_CXX
	@mkdir -p $(@D)
	$(COMPILE_CXX) $(VERSION) $< -o $@

$(BUILD)/gdn/library.o: gdn/library.cpp $(BUILD)/COMPILE_CXX
	@mkdir -p $(@D)
	$(COMPILE_CXX) -fPIC -fvisibility=hidden $< -o $@

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

# ---- tests

$(TESTS): | doctest

doctest:
ifneq ($(DOCTEST),yes)
	@echo "make: the tests need doctest: apt-get install doctest-dev" >&2; exit 1
endif

test: $(PROGRAMS)/train_gdn $(PROGRAMS)/test_gdn
	$(PROGRAMS)/test_gdn

# The layers' tests and one of the whole model; the test that runs out of memory means to. racecheck takes the barriers
# inside cuBLASLt's own kernels (nvjet...) for races, so it leaves out the tests with matrix products.
SANITIZED := --test-case='cuda:*,cuda delta rule*,*the same seed gives the same bits' --test-case-exclude='*out of memory*'
RACECHECKED := --test-case='cuda:*,cuda delta rule*' --test-case-exclude='*out of memory*,*linear*'
sanitize: test_gdn
	compute-sanitizer --tool memcheck --error-exitcode 1 ./test_gdn $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 ./test_gdn $(RACECHECKED)

ci:
	.ci/run

# ---- for developers

bench: dev/bench_layers dev/bench_delta_rule dev/bench_step
	python3 dev/bench.py

dev/bench_%: $(BUILD)/dev/bench_%.o $(RANKS) $(LAYERS) | needs_nvcc
	$(LINK) $^ -o $@ $(LIBS)

# prints the schedules of the delta rule's kernels; needs neither nvcc nor a GPU
dev/delta_rule_plans: $(BUILD)/dev/delta_rule_plans.o
	$(CXX) $(CXXFLAGS) $(EXTRA) $^ -o $@

# reads numbers from a file, for dev/torch/accuracy.py; without nvcc for the CPU alone
dev/delta_rule_file: $(BUILD)/dev/delta_rule_file.o $(LAYERS)
	$(LINK) $^ -o $@ $(LIBS)

.PHONY: needs_nvcc
needs_nvcc:
	$(if $(NVCC),,$(error this target needs nvcc))

debug:
	+$(MAKE) BUILD=build/debug PROGRAMS=build/debug EXTRA='-O1 -g $(EXTRA)' build/debug/train_gdn build/debug/test_gdn

format:
	git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | xargs clang-format -i

gpu-check:
	@echo "nvcc: $(or $(NVCC),not found: builds for the CPU alone)"
	@echo "doctest: $(DOCTEST), MPI: $(MPI), NCCL: $(NCCL)"
	@nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader 2>/dev/null || echo "GPU: none"

clean:
	rm -rf build
	rm -f train_gdn test_gdn libgdn.so dev/bench_layers dev/bench_delta_rule dev/bench_step dev/bench_overlap dev/delta_rule_file dev/delta_rule_plans
