#!/bin/sh
# What `lathe remote` does on a host: ssh HOST sh -s -- FOLDER COMMAND ARGUMENTS <host.sh
#
# FOLDER holds repository.git (where commits go to, and experiments), cache (DVC's), checkout (the environment, and
# unfinished work in .scratch), and runs/NAME (job.json, run.sh, pid, log, and exit once it has ended).
set -eu
folder=$1
command=$2
shift 2
case $folder in
/*) ;;
*) folder=$HOME/$folder ;;
esac

fail() {
	echo "$1" >&2
	exit 3
}

# The state of a run: none, running, ended (with its exit code), or gone, if it was killed or the host restarted.
state() {
	run=$folder/runs/$1
	if [ ! -d "$run" ]; then
		echo none
	elif [ -s "$run/pid" ] && ps -o args= -p "$(cat "$run/pid")" 2>/dev/null | grep -qF "$run/run.sh"; then
		echo running
	elif [ -s "$run/exit" ]; then
		echo "ended $(cat "$run/exit")"
	else
		echo gone
	fi
}

case $command in
prepare)
	for program in git flock setsid; do
		command -v $program >/dev/null || fail "$program is not installed there"
	done
	mkdir -p "$folder/runs" "$folder/cache"
	git init --quiet --bare "$folder/repository.git" 2>/dev/null
	(cd "$folder" && pwd -P)
	;;
start) # NAME COMMIT JOB SETUP RUN: the last three are the contents of files
	name=$1
	commit=$2
	[ "$(state "$name")" != running ] || fail "$name is running there already"
	run=$folder/runs/$name
	mkdir -p "$run"
	rm -f "$run/exit" "$run/pid"
	printf '%s\n' "$3" >"$run/job.json"
	printf '%s\n' "$4" >"$run/setup.sh"
	printf '%s\n' "$5" >"$run/command.sh"
	cat >"$run/run.sh" <<'END'
folder=$1 run=$2 commit=$3
end() { echo "$1" >"$run/exit.new" && mv "$run/exit.new" "$run/exit" && exit "$1"; }
exec 9>>"$folder/lock"
if flock --nonblock --exclusive 9; then # nobody works in the checkout: it gets this commit
	[ -d "$folder/checkout/.git" ] || git clone --quiet --no-checkout "$folder/repository.git" "$folder/checkout" || end 2
	cd "$folder/checkout" || end 2
	git fetch --quiet origin || end 2
	git checkout --quiet --force -B lathe-remote "$commit" || end 2
	git config user.name >/dev/null || git config user.name "$(id -un)"
	git config user.email >/dev/null || git config user.email "$(id -un)@$(uname -n)"
	# What else the host's user has written there, such as keys of a remote, stays.
	grep -qsF "dir = $folder/cache" .dvc/config.local || printf '[cache]\n    dir = %s\n' "$folder/cache" >>.dvc/config.local
	echo "setting up the environment"
	sh "$run/setup.sh" 9>&- || { echo "error: the set-up failed; see above" >&2 && end 2; }
	flock --shared 9
else
	flock --shared 9 # waits for one that sets up
	cd "$folder/checkout" || end 2
	if [ "$(git rev-parse HEAD)" != "$commit" ]; then
		echo "error: runs of another commit are going on in $folder; wait for their end, or give --folder another" >&2
		end 2
	fi
fi
PATH=$PWD/.venv/bin:$PATH PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1
export PATH PYTHONPATH PYTHONUNBUFFERED
sh -c 'exec 9>&-; . "$1"' sh "$run/command.sh" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do
	code=0
	wait "$child" || code=$?
done
end "$code"
END
	setsid nohup sh "$run/run.sh" "$folder" "$run" "$commit" >"$run/log" 2>&1 </dev/null &
	echo $! >"$run/pid"
	;;
status) # [NAME …]: a line each
	cd "$folder/runs" 2>/dev/null || exit 0
	[ $# -gt 0 ] || set -- *
	for name; do
		[ "$name" = "*" ] || echo "$name $(state "$name")"
	done
	;;
logs) # NAME FOLLOW
	run=$folder/runs/$1
	[ -f "$run/log" ] || fail "there is no run $1"
	if [ "$2" = follow ] && [ "$(state "$1")" = running ]; then
		exec tail -n +1 -f --pid="$(cat "$run/pid")" "$run/log"
	fi
	exec cat "$run/log"
	;;
stop) # NAME
	[ "$(state "$1")" = running ] || fail "$1 is not running there"
	kill -TERM "$(cat "$folder/runs/$1/pid")"
	;;
*) fail "$command: no command of host.sh" ;;
esac
