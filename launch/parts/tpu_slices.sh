# shellcheck shell=bash disable=SC2034,SC2154
# Slices of launch/tpu_vm.sh: made, watched, made again, deleted. Sourced; names without a definition here are its own.

poll_secs="${CAPRL_JAX_POLL_SECS:-60}"
retry_secs=$((poll_secs < 10 ? poll_secs : 10))

# ---- states ----

# slice_state: what gcloud calls it; NONE where there is no such slice, UNKNOWN where gcloud could not say.
#   queued resources: CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE FAILED SUSPENDING SUSPENDED DELETING
#   slices: CREATING READY RESTARTING REIMAGING REPAIRING STARTING STOPPING STOPPED PREEMPTED TERMINATED DELETING
slice_state() {
  local said=""
  mkdir -p "$(dirname "$said_file")"
  said="$(describe 2>"$said_file")" || said=""
  if [[ -n "$said" ]]; then
    echo "$said"
  elif grep -q NOT_FOUND "$said_file"; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

is_up() {
  [[ "$1" == ACTIVE || "$1" == READY ]]
}

# Whether a slice in this state will not be up again: preempted, suspended, deleted by somebody.
is_gone() {
  case "$1" in
    FAILED | SUSPENDING | SUSPENDED | STOPPING | STOPPED | PREEMPTED | TERMINATED | DELETING | NONE) return 0 ;;
  esac
  return 1
}

describe() {
  if [[ -n "$queued" ]]; then
    queued_resource describe "$name" --format='value(state.state)'
  else
    tpu describe "$name" --format='value(state)'
  fi
}

# Why a queued resource failed, in the words of the service.
why_failed() {
  queued_resource describe "$name" --format='value(state.failedData.error.message)' 2>/dev/null || true
}

no_quota() { # no_quota WORDS
  [[ "$1" == *[Qq]uota* || "$1" == *QUOTA* ]]
}

no_capacity() { # no_capacity WORDS
  [[ "$1" == *"no more capacity"* || "$1" == *"nsufficient capacity"* || "$1" == *"not enough resources"* ||
    "$1" == *tockout* || "$1" == *RESOURCE_EXHAUSTED* || "$1" == *'"code": 8'* ]]
}

fail_for_quota() {
  slice_exists=""
  fail "no quota for $type${spot:+ (spot)} in $zone: ask for more (console.cloud.google.com/iam-admin/quotas, service" \
    "tpu.googleapis.com), or take another --zone or --type; spot slices have a quota of their own (--spot)"
}

# ---- the budget ----

active_since="" # SECONDS when the slice that is there became active
active_secs=0   # of slices that are gone

# Whole seconds of the budget that are left; without a budget, a day, after which a caller asks again.
budget_left() {
  local active="$active_secs"
  if [[ -z "$budget" ]]; then
    echo 86400
    return
  fi
  if [[ -n "$active_since" ]]; then
    active=$((active + SECONDS - active_since))
  fi
  awk -v hours="$budget" -v active="$active" 'BEGIN { left = int(hours * 3600) - active; print (left > 0 ? left : 0) }'
}

budget_is_spent() {
  [[ -n "$budget" && -z "$dry_run" ]] && (($(budget_left) == 0))
}

count_active() {
  if [[ -n "$active_since" ]]; then
    active_secs=$((active_secs + SECONDS - active_since))
    active_since=""
  fi
}

# ---- make ----

# Asks for the slice. What gcloud says is shown, and kept for `no_quota` and `no_capacity`.
request() {
  local arguments
  if [[ -z "$queued" ]]; then
    arguments=(tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot})
  elif ((slices > 1)); then
    arguments=(queued_resource create "$name" --node-count="$slices" --accelerator-type="$type"
      --runtime-version="$version" ${spot:+--spot})
  else
    arguments=(queued_resource create "$name" --node-id="$name" --accelerator-type="$type"
      --runtime-version="$version" ${spot:+--spot})
  fi
  if [[ -n "$dry_run" ]]; then
    "${arguments[@]}"
    return
  fi
  mkdir -p "$(dirname "$said_file")"
  { "${arguments[@]}" 2>&1 1>&3 | tee "$said_file" >&2; } 3>&1
}

step_create() {
  local code failures=0 said=""
  say "Making $name ($type, $version${spot:+, spot}) in $zone ..."
  while :; do
    slice_exists=perhaps
    code=0
    request || code=$?
    if ((code != 0)); then
      said="$(cat "$said_file")"
      if [[ "$said" == *ALREADY_EXISTS* || "$said" == *"already exists"* ]]; then
        say "$name exists already: it is taken as it is."
      elif no_quota "$said"; then
        fail_for_quota
      elif ! no_capacity "$said"; then
        exit "$code"
      elif [[ -z "$spot" ]]; then
        slice_exists=""
        fail "$zone has no $type to give now: --queued waits for one, --spot asks again and again," \
          "and another --zone may have one"
      else
        slice_exists=""
        failures=$((failures + 1))
        give_up_after "$failures"
        sleep "$poll_secs"
        continue
      fi
    fi
    if [[ -n "$queued" || "$code" != 0 ]]; then
      wait_until_up
      if [[ -n "$gone" ]]; then # before it was up; a spot request only
        failures=$((failures + 1))
        step_delete
        give_up_after "$failures"
        sleep "$poll_secs"
        continue
      fi
    fi
    active_since="$SECONDS"
    return
  done
}

give_up_after() {
  if (($1 >= 100)); then
    fail "$name: asked for a spot slice $1 times, and got none; try another --zone or --type, or without --spot"
  fi
}

# Leaves in `gone` whether a spot request failed, or was taken away, before it was up. Another request that fails ends
# the script.
wait_until_up() {
  local state="" why=""
  gone=""
  say "Waiting until $name is active (asking every $poll_secs seconds) ..."
  while :; do
    if [[ -n "$dry_run" ]]; then
      describe
      return
    fi
    state="$(slice_state)"
    if is_up "$state"; then
      return
    fi
    if is_gone "$state"; then
      if [[ "$state" == FAILED ]]; then
        why="$(why_failed)"
        if no_quota "$why"; then
          say "$name is FAILED: $why"
          step_delete
          fail_for_quota
        fi
      fi
      if [[ -n "$spot" ]]; then
        say "$name is $state${why:+: $why}; asking again ..."
        gone=yes
        return
      fi
      fail "$name is $state: ${why:-no capacity, no quota, or taken away};" \
        "'gcloud compute tpus ${queued:+queued-resources}${queued:-tpu-vm} describe $name --zone=$zone' says which"
    fi
    say "$name: $state"
    sleep "$poll_secs"
  done
}

# ---- watch ----

# Follows the log until the run has ended, and leaves in `outcome`: ended (with `run_code`), lost (the worker restarted,
# or the run was killed), none (no run), gone (the slice), spent (the budget), unreachable. What ended the following
# (the run, the connection, gcloud) cannot be told from its exit code, so the worker is asked.
follow() {
  local state="" began=0 failures=0
  say "Following worker 0 of $name; the run does not depend on it ..."
  if [[ -n "$dry_run" ]]; then
    on_worker 0 "secs=$(budget_left)"$'\n'"$(remote_follow)" -oServerAliveInterval=30
    on_worker 0 "$(remote_state)"
    outcome=ended
    return
  fi
  trap 'say "The run goes on; follow it with: $(own_line logs)"; exit 130' INT
  while :; do
    began="$SECONDS"
    on_worker 0 "secs=$(budget_left)"$'\n'"$(remote_follow)" -oServerAliveInterval=30 || true
    state="$(on_worker 0 "$(remote_state)")" || state="unreachable"
    case "$state" in
      none | lost)
        outcome="$state"
        break
        ;;
      [0-9] | [0-9][0-9] | [0-9][0-9][0-9])
        outcome=ended
        run_code="$state"
        say "The run ended with exit code $run_code."
        break
        ;;
      unreachable)
        if is_gone "$(slice_state)"; then
          outcome=gone
          break
        fi
        ;;
    esac
    if budget_is_spent; then
      outcome=spent
      break
    fi
    if ((SECONDS - began > 60)); then
      failures=0
    fi
    failures=$((failures + 1))
    if ((failures > 30)); then
      outcome=unreachable
      break
    fi
    say "The connection ended ($state); trying again in $retry_secs seconds ..."
    sleep "$retry_secs"
  done
  trap - INT
}

fail_to_follow() {
  case "$outcome" in
    none) fail "no run was started on $name; start one with the subcommand run" ;;
    lost)
      fail "the run on worker 0 of $name ended without an exit code: the worker restarted, or the run was killed;" \
        "the subcommand run starts it again, from its last checkpoint"
      ;;
    unreachable)
      echo "error: worker 0 of $name cannot be followed; the run may go on. Again with: $(own_line logs)" >&2
      exit 1
      ;;
  esac
}

step_logs() {
  follow
  fail_to_follow
  if [[ "$outcome" == gone ]]; then
    echo "error: $name was taken away; delete what is left of it, then \`all\` with the same flags goes on" \
      "where the workdir is in gs://: $(own_line delete)" >&2
    exit 75
  fi
}

step_status() {
  if [[ -n "$dry_run" ]]; then
    describe
    on_worker 0 "$(remote_state)"
    return
  fi
  local state run=""
  state="$(slice_state)"
  if is_up "$state"; then
    run="$(on_worker 0 "$(remote_state)")" || run="unreachable"
  fi
  case "$run" in
    "") echo "$name: $state" ;;
    none | running | lost | unreachable) echo "$name: $state, run: $run" ;;
    *) echo "$name: $state, run: ended with exit code $run" ;;
  esac
}

# ---- again, until the run is complete ----

# try STEP: runs it as bash runs a script, and leaves its exit code in `failed` and in `gone` whether the slice is gone.
# Call it in no condition: there bash would go on after a command that fails.
try() {
  gone="" failed=0
  set +e
  (
    set -e
    "$@"
  )
  failed=$?
  set -e
  if ((failed != 0)) && [[ "$workdir" != gs://* || "$1" != step_fetch ]] && is_gone "$(slice_state)"; then
    gone=yes
  fi
}

# Makes what is missing, starts the run and follows it, again after a preemption and after exit code 75. Leaves `outcome`
# as ended or spent; another one ends the script.
run_until_complete() {
  local ready="" began=0 quick=0
  while :; do
    if [[ -z "$ready" ]]; then
      step_create
      try step_install
    else
      gone="" failed=0
    fi
    if [[ -z "$gone" ]] && ((failed == 0)); then
      ready=yes
      began="$SECONDS"
      try step_run
    fi
    if [[ -z "$gone" ]] && ((failed != 0)); then
      exit "$failed"
    fi
    if [[ -n "$gone" ]]; then
      outcome=gone
    else
      follow
    fi
    if [[ -n "$dry_run" ]]; then
      say_what_else_may_come
    fi
    case "$outcome" in
      ended)
        if ((run_code != 75)); then
          return
        fi
        ;;
      spent)
        say "The budget of $budget hours is spent; the run is asked to save and to end ..."
        on_worker all "secs=300"$'\n'"$(remote_stop)" || true
        run_code=75
        return
        ;;
      gone)
        replace_slice
        ready=""
        continue
        ;;
      lost) say "The run on worker 0 ended without an exit code: the worker restarted, or the run was killed." ;;
      *) fail_to_follow ;;
    esac
    if is_gone "$(slice_state)"; then # its workers are told some seconds before
      replace_slice
      ready=""
      continue
    fi
    quick=$((SECONDS - began < 600 ? quick + 1 : 0))
    if ((quick == 5)); then
      run_code=75
      outcome=ended
      say "The run asked to be run again five times within ten minutes each; its log says why."
      return
    fi
    say "Starting it again in $retry_secs seconds ..."
    sleep "$retry_secs"
  done
}

# What a dry run cannot show as commands in a row.
say_what_else_may_come() {
  if [[ "$workdir" == gs://* ]]; then
    say "When the slice is taken away: $(delete_command), then all of this again until the run is complete."
  fi
  say "After exit code 75: the run is started again, as above."
  if [[ -n "$budget" ]]; then
    say "When $budget hours are spent: the run gets SIGTERM, on which it saves; then what follows."
  fi
}

# After a preemption.
replace_slice() {
  say "$name was taken away."
  step_delete
  if [[ "$workdir" != gs://* ]]; then
    say "Its disk is gone, and with it $workdir. With --workdir=gs://BUCKET/FOLDER a run goes on on another slice."
    exit 75
  fi
  if budget_is_spent; then
    say "The budget of $budget hours is spent. The same line with a larger --budget goes on."
    exit 75
  fi
  say "Making it again; the run goes on from its last checkpoint ..."
}

# ---- delete ----

# As one line, for a worker too.
delete_command() {
  if [[ -z "$queued" ]]; then
    quote gcloud compute tpus tpu-vm delete "$name" --zone="$zone" ${project:+"--project=$project"} --quiet
  else
    quote gcloud compute tpus queued-resources delete "$name" --force --zone="$zone" \
      ${project:+"--project=$project"} --quiet
  fi
}

# What is not there need not be deleted, and what is being suspended cannot be, for a while.
step_delete() {
  local code state tries=0
  say "Deleting $name ..."
  while :; do
    code=0
    if [[ -z "$queued" ]]; then
      tpu delete "$name" || code=$?
    else
      queued_resource delete "$name" --force || code=$? # --force: with its nodes
    fi
    if ((code == 0)); then
      break
    fi
    state="$(slice_state)"
    if [[ "$state" == NONE ]]; then
      break
    fi
    tries=$((tries + 1))
    if ((tries == 20)) || [[ "$state" != *ING && "$state" != UNKNOWN ]]; then
      exit "$code"
    fi
    say "$name is $state, and cannot be deleted yet; trying again ..."
    sleep "$poll_secs"
  done
  slice_exists=""
  count_active
}
