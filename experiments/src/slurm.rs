//! Plans as job scripts for [Slurm](https://slurm.schedmd.com): the stages that are left become job
//! arrays.
//!
//! Stages are files in a store that all nodes share, so a job needs only the key of its stage. An
//! array holds the stages that need only stages of earlier arrays, and starts when those are done.

use crate::command::quoted;
use crate::flags::TIME_LIMIT;
use anyhow::Result;
use std::collections::BTreeMap;
use workflow::Planned;

/// The script up to its arrays.
const HEAD: &str = r##"#!/bin/bash
# Submits the stages that are left to Slurm. Run it in the folder where the program was asked for its plan, with the
# options that sbatch needs, such as
#   bash THIS_SCRIPT --partition=PARTITION --cpus-per-task=2 --time=4:00:00
# LAUNCH starts the program in each job, where several processes are to train together, such as
#   LAUNCH="srun --mpi=pmix --kill-on-bad-exit=1" bash THIS_SCRIPT --ntasks=8
set -euo pipefail
options=("$@")
launch=(${LAUNCH:-})
program=(@PROGRAM@)
jobs=()

# Submits a job for each key, to begin when all jobs that were submitted before have succeeded.
array() {
  local name=$1 after=()
  shift
  [ ${#jobs[@]} = 0 ] || after=("--dependency=afterok:$(IFS=:; echo "${jobs[*]}")" --kill-on-invalid-dep=yes)
  jobs+=("$(sbatch --parsable --job-name="$name" --array="0-$(($# - 1))" "${after[@]}" "${options[@]}" <<JOB
#!/bin/bash
keys=($*)
key=\${keys[SLURM_ARRAY_TASK_ID]}
$(printf '%q ' "${launch[@]}" "${program[@]}") \${key:+--stage "\$key"} && exit
status=\$?
# Its --time-limit ended it, and it goes on from its checkpoint.
[ \$status != @TIME_LIMIT@ ] || exec scontrol requeue "\${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID"
exit \$status
JOB
  )")
  echo "${jobs[-1]}: $name"
}

"##;

/// Returns a Bash script that submits the stages of a plan that are left, and then the program
/// itself, which by then only has to write its results. `command` is the program and its flags;
/// `title` names the jobs.
pub(crate) fn script(plan: &[Planned], fingerprint: &str, command: &[String], title: &str) -> Result<String> {
    let mut levels: Vec<Vec<&Planned>> = Vec::new();
    let mut level_of: BTreeMap<String, usize> = BTreeMap::new();
    // Parents come before their children.
    for planned in plan.iter().filter(|planned| planned.to_do) {
        let parent = planned.stage.parent.as_ref().map(|parent| parent.key(fingerprint)).transpose()?;
        let level = parent.and_then(|parent| level_of.get(&parent)).map_or(0, |level| level + 1);
        level_of.insert(planned.key.clone(), level);
        levels.resize_with(levels.len().max(level + 1), Vec::new);
        levels[level].push(planned);
    }
    let program: Vec<String> = command.iter().cloned().map(quoted).collect();
    let head = HEAD.replace("@PROGRAM@", &program.join(" ")).replace("@TIME_LIMIT@", &TIME_LIMIT.to_string());
    let array = |(number, level): (usize, &Vec<&Planned>)| {
        let labels: String = level.iter().map(|of| format!("# {}  {}\n", of.key, of.stage.label())).collect();
        let keys: Vec<&str> = level.iter().map(|of| of.key.as_str()).collect();
        format!("{labels}array {title}-{} {}\n", number + 1, keys.join(" "))
    };
    let arrays: String = levels.iter().enumerate().map(array).collect();
    Ok(format!("{head}{arrays}# Then no stage is left, and the results are written.\narray {title} ''"))
}
