#!/usr/bin/env bash
# A job for Slurm: one rank a GPU, on one host or several, which goes on where the last one ended.
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 12:00:00 scripts/slurm.sh -w 2048 -L 21 -i '/data/train_*.bin' -o /shared/run
#
# All options go to train_gdn; -o, a folder that all hosts see, is needed. The number of ranks, a power of two, has to
# divide the micro-batches of a step (-B over -b). Slurm sends SIGUSR1 two minutes before the time is over (--signal
# below): the ranks agree on the step, save and leave, and the job queues itself again. It resumes from the newest
# whole checkpoint, on however many GPUs it then gets, with the same bits.
#
# Without a queue, on one host:           mpirun -n 8 ./train_gdn OPTIONS
# on several, with ssh between them:      mpirun --host a:8,b:8 ./train_gdn OPTIONS
#
#SBATCH --job-name train_gdn
#SBATCH --cpus-per-task 8
#SBATCH --signal USR1@120
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output train_gdn-%j.out
set -uo pipefail
train_gdn=${TRAIN_GDN:-${SLURM_SUBMIT_DIR:-.}/train_gdn}
case " $* " in
*" -o "*) ;;
*) echo "slurm.sh: -o FOLDER is needed, a folder that all hosts see" >&2 && exit 1 ;;
esac
# Whether a task sees all GPUs of its host or one of its own, each rank takes another one.
srun --mpi="${SLURM_MPI:-pmix}" --kill-on-bad-exit=1 "$train_gdn" -resume auto "$@" && exit 0
code=$?
# 128 + SIGUSR1: the time is nearly over, and the run is saved
if [ $code = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
