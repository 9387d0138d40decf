# shellcheck shell=bash disable=SC2004,SC2034,SC2154 # read on its own, it has neither the arrays nor the variables of start_mesh.sh
# The story that start_mesh.sh tells, and checks: everything said to be ok was looked at, and the first thing that is not ends it.
# Sourced by start_mesh.sh, whose variables and functions it uses.

bold='' green='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
  bold=$'\e[1m' green=$'\e[32m' plain=$'\e[0m'
fi
chapters=0
# The command that runs now, and the load beside a rollout: their processes. Where that load writes each answer down.
asking='' loader='' trace=''
# What the last command printed, and the last picture of the mesh as JSON.
said='' picture=''
# More requests than any chapter waits for.
load_count=10000000
# Longest time from the bad answer that is one too many to the last canary answer on any node, in milliseconds.
away_ms_max=100
# peers.json as it was, while links are cut.
peers_whole=peers.json.whole
links_cut=no

# The story is about the mesh as it is shipped. Sets `a`, `b` and `c`, the last being the highest id.
refuse_other_mesh() {
  local hint="Restore it with git checkout peers.json, or start it without the story: --no-demo."
  ((${#ids[@]} == 3)) || die "the story is about three nodes, and peers.json has ${#ids[@]}. $hint"
  ! grep -q '"partitions"' peers.json || die "the story cuts links by the key partitions, which peers.json has already. $hint"
  a=${ids[0]} b=${ids[1]} c=${ids[2]}
  # By stable's own 99th percentile a good canary could look slow where two cores have other things to do. What counts here is what fails.
  local gate='"gate": { "latency_ms_max": 500 }'
  grep -qF '"shield": true' peers.json && grep -qF "$gate" peers.json || die "the story goes by \"shield\": true and $gate, \
and peers.json has not both. $hint"
}

# One node gets a folder of its own, so that a model is missing there.
make_poor_models() {
  models[$c]=$logs/$c.models
  mkdir -p "${models[$c]}"
  cp models/digits-v1.onnx models/digits-v2.onnx "${models[$c]}/"
}

# chapter TITLE
chapter() {
  chapters=$((chapters + 1))
  step="step $chapters ($1)"
  say "" "$bold$chapters. $1$plain"
}

# A command, as it can be typed.
show_command() {
  say "   $bold\$ $*$plain"
}

ok() {
  say "   ${green}ok$plain $*"
}

# run CODE WORD…: the program with these words, which must end with this exit code.
run() {
  local expected=$1 code=0 line
  shift
  show_command "$binary" "$@"
  said=''
  exec 8< <(exec "$binary" "$@" 2>&1 9>&-)
  asking=$!
  while IFS= read -r line <&8; do
    said+=${said:+$'\n'}$line
    say "     $line"
  done
  exec 8<&-
  wait "$asking" || code=$?
  asking=''
  # When a node was killed meanwhile, the shell has a notice of its own to get rid of.
  { jobs >/dev/null; } 2>/dev/null
  ((code == expected)) || die "this should have ended with exit code $expected, and ended with $code."
}

# told PATTERN: the last command has printed such a line.
told() {
  grep -qE -- "$1" <<<"$said" || die "a line like /$1/ should have been printed."
}

# answered VARIANT MODEL SHARE_MIN SHARE_MAX RIGHT_MIN RIGHT_MAX: the last load's row of this variant is within these, in percent.
answered() {
  local row model requests share right
  row=$(awk -v variant="$1" '$1 == variant { print $2, $3, $4, $5 }' <<<"$said")
  read -r model requests share right <<<"$row"
  [[ $model == "$2" ]] || die "$2 should have answered as $1."
  within "$share" "$3" "$4" || die "the share of $2 is $share %, and should be $3 to $4 %."
  within "$right" "$5" "$6" || die "$2 was right in $right %, and should be in $5 to $6 %."
  ok "$2 ($1) answered $requests, which is $share %, and $right % of its answers are right."
}

# start_load NAME RATE: requests to all nodes in turn, until end_load.
start_load() {
  local words=(load --file models/requests.ndjson --rate "$2" --count "$load_count")
  trace=$logs/$1.csv
  words+=(--trace "$trace")
  rm -f "$trace"
  show_command "$binary" "${words[@]}" "&"
  "$binary" "${words[@]}" >"$logs/load.out" 2>&1 </dev/null 9>&- &
  loader=$!
  wait_for "the first answers" test -s "$trace"
}

# end_load: after what comes within half a second yet. No request may have failed.
end_load() {
  local code=0
  sleep 0.5
  show_command "kill \$!"
  kill "$loader" 2>/dev/null || true
  { wait "$loader" || code=$?; } 2>/dev/null
  loader=''
  said=$(<"$logs/load.out")
  say "     ${said//$'\n'/$'\n'     }"
  ((code == 0)) || die "every request should have been answered, and load ended with $code."
  told ', 0 failed$'
}

# However the story ends, nobody goes on asking.
hush() {
  local pid
  for pid in $asking $loader; do
    # Its death is no news.
    { kill -KILL "$pid" && wait "$pid"; } 2>/dev/null || true
  done
}

# one_step VERSION SHARE_MIN SHARE_MAX: of the answers that were given by this version, the canary's share is within these, in percent.
one_step() {
  local counts answers share
  counts=$(awk -F, -v version="$1" '
    $8 == version { answers++; canary += $6 == "canary" }
    END { if (answers) printf "%d %.1f", answers, canary * 100 / answers }' "$trace")
  [[ -n $counts ]] || die "no answer was given by version $1."
  read -r answers share <<<"$counts"
  within "$share" "$2" "$3" || die "at version $1 the canary's share is $share %, and should be $2 to $3 %."
  ok "version $1: $share % of $answers answers are the canary's."
}

# committed_since SLOT: kind and version of every commit from this slot on, by the history that was printed last.
committed_since() {
  awk -v first="$1" '$1 ~ /^[0-9]+$/ && $1 >= first && $6 == "committed" { printf "%s %s, ", $5, $7 }' <<<"$said"
}

# taken_away ID COUNT: from the sending of the request that became this node's COUNTth failure of a canary, to the last answer for which
# any node asked its canary, in milliseconds. Empty if it had not so many, or if not every node has answered 20 requests since.
taken_away() {
  awk -F, -v id="$1" -v count="$2" '
    NR == 1 { next }
    $9 == "fallback" && $4 == id && ++failures == count { crossed = $2 }
    $9 == "fallback" || $6 == "canary" { if ($3 > last) last = $3; delete since; next }
    { since[$4]++ }
    END {
      for (node in since) if (since[node] >= 20) nodes++
      if (crossed && nodes == 3) printf "%.1f", last - crossed
    }' "$trace"
}

within() {
  awk -v number="$1" -v min="$2" -v max="$3" 'BEGIN { exit !(number >= min && number <= max) }'
}

# all_at VERSION SLOT [OPTION…]: the nodes asked are well, and all of them there with the same hash. The slot may be `any`, the same for all:
# where nodes decide by themselves, one step may take two tries.
all_at() {
  local version=$1 slot=$2
  shift 2
  picture=$("$binary" status --output json "$@" 2>/dev/null) || return 1
  [[ $slot != any ]] || slot=$(every slot)
  [[ $slot =~ ^[0-9]+$ && $(every version) == "$version" && $(every slot) == "$slot" && $(every state_hash) =~ ^[0-9a-f]{64}$ ]]
}

# every KEY: the different values that the nodes of the picture have there, a line each.
every() {
  sed -nE "s/^ {6}\"$1\": \"?([^\",]*)\"?,?\$/\1/p" <<<"$picture" | sort -u
}

# The transaction that was decided in this slot, by the history of `b`.
transaction_of() {
  "$binary" history --endpoint "${data[$b]}" --from "$1" --limit 1 --output json | sed -nE 's/^ +"txid": "(.*)",$/\1/p'
}

# happened ID PATTERN…: one of this node's events has all of these. A field may be the last of its line, or not: [,}].
happened() {
  local events text
  events=$(<"$logs/$1.events.ndjson")
  shift
  for text in "$@"; do
    events=$(grep -e "$text" <<<"$events") || return 1
  done
}

# resolved SLOT: whether somebody has, and sets `resolver`. The highest id tries first, the next one 250 ms later.
resolved() {
  if happened "$c" '"event":"resolving"' "\"slot\":$1[,}]"; then
    resolver="$c, the highest id,"
  else
    happened "$b" '"event":"resolving"' "\"slot\":$1[,}]" && resolver="$b, as $c was slower,"
  fi
}

# voted_yes SLOT: both survivors have.
voted_yes() {
  happened "$b" '"event":"voted"' "\"slot\":$1[,}]" '"yes":true' && happened "$c" '"event":"voted"' "\"slot\":$1[,}]" '"yes":true'
}

common_hash() {
  every state_hash | cut -c 1-8
}

# cut_links GROUPS: atomically, as the nodes may read peers.json at any moment.
cut_links() {
  local key="\"partitions\": $1," text
  text=$(<peers.json)
  links_cut=yes
  cp -p peers.json peers.json.new
  mv peers.json.new "$peers_whole"
  printf '{\n  %s%s\n' "$key" "${text#*\{}" >peers.json.new
  "$binary" peers check peers.json.new >/dev/null || die "the key $key does not fit into this peers.json."
  mv peers.json.new peers.json
}

heal_links() {
  [[ $links_cut == yes ]] || return 0
  rm -f peers.json.new
  [[ ! -f $peers_whole ]] || mv "$peers_whole" peers.json
  links_cut=no
}

# After a run that nothing could tidy up after, such as one killed with -9.
mend_peers_file() {
  [[ -f $peers_whole ]] || return 0
  mv "$peers_whole" peers.json
  say "peers.json was left cut by a story that was killed; it is whole again."
}

# all_linked VERSION SLOT: all nodes are there, and every link is up at both ends.
all_linked() {
  all_at "$@" && links_are up 6
}

# links_are WORD COUNT: so many ends of links are in this state.
links_are() {
  picture=$("$binary" status --output json 2>/dev/null) || true
  [[ $(grep -c "\"link\": \"$1\"" <<<"$picture") == "$2" ]]
}

# sees ID TEXT: what this node tells of itself has this line. It may have something to complain of.
sees() {
  picture=$("$binary" status --endpoint "${data[$1]}" --output json 2>/dev/null) || true
  grep -qE "^ +$2,?\$" <<<"$picture"
}

lease_is_over() { sees "$1" '"held": false'; }

holds_lease() { sees "$1" '"held": true'; }

# Whether `b` knows of a majority that has fenced somebody.
is_fenced() { sees "$b" '"majority": true'; }

tell_story() {
  local requests=models/requests.ndjson cut away_ms
  wait_for "all nodes to be linked, at version 0" all_linked 0 0

  chapter "400 held-out digits are answered by digits-v1"
  run 0 load --file "$requests" --rate 1000
  answered stable digits-v1 100 100 88 95

  chapter "digits-v2 gets 10 % by one decision of all three nodes"
  run 0 propose --canary digits-v2 --weight 10
  told '^committed '
  wait_for "all three to be at version 1" all_at 1 1
  run 0 status
  ok "all three are at version 1 with the same hash, $(common_hash)."

  chapter "The same digits ten times over are split, and digits-v2 is better"
  run 0 load --file "$requests" --count 4000 --rate 2000
  answered stable digits-v1 87 93 88 95
  answered canary digits-v2 7 13 93 100

  chapter "A model that only two nodes have is refused"
  say "   $c runs with its own folder of models, ${models[$c]}, which lacks digits-v3."
  run 1 propose --canary digits-v3 --weight 10
  told '^aborted '
  told "^$c +no +.*digits-v3"
  wait_for "all three to record the abort" all_at 1 2
  ok "$c voted no, so nobody switched: all three are still at version 1, and the abort is on record in slot 2."

  chapter "The coordinator is killed between the votes and the decision"
  say "   $a is started again with a fault: when all votes are in, and before it decides, it kills itself with SIGKILL."
  show_command "kill \$(cat $logs/$a.pid)"
  stop_node "$a"
  show_command "$binary serve --id $a --fault kill-before-decision &"
  start_node "$a" --fault kill-before-decision
  wait_for "$a to be back" all_linked 1 2
  run 4 propose --endpoint "${data[$a]}" --weight 20
  await_end "$a"
  ((ended == 128 + 9)) || die "$a should have been killed by SIGKILL, and ended with $ended."
  ok "$a is dead, and its caller is told the truth: the outcome is unknown."
  wait_for "$b and $c to decide without $a" all_at 1 3 --endpoint "${data[$b]}" --endpoint "${data[$c]}"
  run 0 status --endpoint "${data[$b]}" --endpoint "${data[$c]}"
  wait_for "$b and $c to tell of their votes" voted_yes 3
  wait_for "somebody to tell that slot 3 was resolved" resolved 3
  run 1 tx show "$(transaction_of 3)" --endpoint "${data[$c]}"
  told '^reason: coordinator lost'
  ok "$b and $c had voted yes. $resolver resolved slot 3: aborted. Both have the same hash, $(common_hash)."

  chapter "The killed node comes back and catches up"
  show_command "$binary serve --id $a &"
  start_node "$a"
  wait_for "$a to catch up" all_linked 1 3
  run 0 status
  ok "$a has replayed its log and learnt of the abort; all three have the same hash, $(common_hash)."

  chapter "A node is cut off while the canary is live"
  cut="[[\"$a\"], [\"$b\", \"$c\"]]"
  cut_links "$cut"
  say "   peers.json now has ${bold}\"partitions\": $cut$plain, and the nodes read it again."
  wait_for "the links of $a to be cut at both ends" links_are cut 4
  run 0 load --endpoint "${data[$a]}" --file "$requests" --rate 1000
  answered canary digits-v2 2 20 75 100
  say "   $a still has a lease, from the last beats that $b and $c answered. Waiting until it is over, which takes 6 s at most."
  wait_for "the lease of $a to end" lease_is_over "$a"
  run 0 load --endpoint "${data[$a]}" --file "$requests" --rate 1000
  answered stable digits-v1 100 100 88 95
  told 'reasons: lease-expired'
  run 1 propose --endpoint "${data[$a]}" --weight 50
  told 'no majority'
  ok "$a has gone back to digits-v1 by itself, and alone it could decide nothing."

  chapter "The others go on without it: one step forward, and all the way back"
  wait_for "$b and $c to have fenced $a" is_fenced
  run 0 propose --endpoint "${data[$b]}" --weight 20
  told "^$a +excused +fenced"
  run 5 status
  told "^$a is behind: at slot 3, and others are at 4"
  run 0 rollback --watch --endpoint "${data[$b]}"
  told "^$a +excused"
  told 'no canary anywhere'
  ok "$a serves stable whatever it knows, so $b and $c needed no vote of it: not for 20 %, and not for the rollback."

  chapter "The cut heals"
  heal_links
  say "   peers.json is as it was."
  wait_for "$a to catch up" all_linked 3 5
  wait_for "$a to have a lease again" holds_lease "$a"
  run 0 status
  ok "all three are at version 3 with the same hash, $(common_hash)."

  chapter "digits-v2 goes from 1 % to all traffic by itself"
  start_load rollout 4000
  run 0 rollout start --model digits-v2 --steps 1,10,50,100 --bake 1s --watch
  told '^rollout r[0-9]+ is promoted'
  wait_for "all three to be at version 8" all_at 8 any
  end_load
  run 0 history --from 6
  [[ $(committed_since 6) == "advance 4, advance 5, advance 6, advance 7, advance 8, " ]] ||
    die "there should have been five commits since slot 5, one for each step and one for the promotion."
  one_step 4 0.6 1.4
  one_step 5 7 13
  one_step 6 43 57
  one_step 7 100 100
  run 0 load --file "$requests" --rate 1000
  answered stable digits-v2 100 100 93 100
  ok "each step was one decision, made when all nodes together had seen enough. No request failed, and all three have the same hash, \
$(common_hash)."

  chapter "digits-v3, quick and wrong, is refused by its answers to copies of requests"
  say "   $c gets the file that it lacked, so its models are no reason any more."
  show_command "cp models/digits-v3.onnx ${models[$c]}/"
  cp models/digits-v3.onnx "${models[$c]}/"
  start_load mirror 1000
  run 1 rollout start --model digits-v3 --mirror 20 --watch
  told "^reason +(all nodes together|$a|$b|$c): digits-v3: [0-9]+ of [0-9]+ answers alike, which is below 80 %"
  wait_for "all three to be at version 10" all_at 10 any
  end_load
  answered stable digits-v2 100 100 93 100
  ! grep -q ',digits-v3,' "$trace" || die "somebody got an answer of digits-v3."
  ok "digits-v3 answered copies only: not one caller got it, and all three have taken it back, hash $(common_hash)."

  chapter "A canary that fails on one node only is taken back everywhere, by that node's veto"
  run 0 rollback --stable --watch
  wait_for "all three to be at version 11" all_at 11 any
  say "   digits-v1 is stable again. $b is started again with a fault: whatever its canary would answer is an error 500."
  show_command "kill \$(cat $logs/$b.pid)"
  stop_node "$b"
  show_command "$binary serve --id $b --fault fail-canary &"
  start_node "$b" --fault fail-canary
  wait_for "$b to be back" all_linked 11 any
  wait_for "$b to have a lease again" holds_lease "$b"
  start_load veto 3000
  run 1 rollout start --model digits-v2 --steps 5,50,100 --bake 1s --watch
  told "^rollout r[0-9]+ is rolled back"
  run 0 rollout show "$(sed -nE 's/^rollout (r[0-9]+) is rolled back.*/\1/p' <<<"$said")"
  told "^reason +$b: digits-v2: canary [0-9]+ bad of [0-9]+, stable 0 of [0-9]+ at 5 %: E = [0-9,.]+ ≥ 120"
  wait_for "all three to be at version 13" all_at 13 any
  end_load
  ok "no caller noticed: where the canary of $b failed, stable answered instead, and the answer says fallback."
  # At 5 % and with a stable that is clean, two failures are E = 38 and three are 378: over the bound of a node (120) and of all (40) at once.
  away_ms=$(taken_away "$b" 3)
  [[ -n $away_ms ]] || die "$trace should have three failures of $b, and 20 answers of each node since."
  within "$away_ms" 0 "$away_ms_max" || die "the last canary answer came $away_ms ms after the failure that was one too many, and \
$away_ms_max ms are allowed."
  ok "from the third failure, which crosses the threshold, to the last canary answer on any node: $away_ms ms."
  show_command "kill \$(cat $logs/$b.pid)"
  stop_node "$b"
  show_command "$binary serve --id $b &"
  start_node "$b"
  wait_for "$b to be back" all_linked 13 any
  run 0 load --file "$requests" --rate 1000
  answered stable digits-v1 100 100 88 95
  run 0 status
  ok "all three are at version 13 with the same hash, $(common_hash), and digits-v1 answers everywhere."

  step=''
  say "" "${bold}The story took $SECONDS s, and everything in it was checked.$plain"
}
