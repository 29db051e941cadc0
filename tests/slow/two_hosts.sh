# A network of two "hosts" in namespaces, 10.0.0.1 and 10.0.0.2, each with processes, a network, a
# home and an sshd of its own; runs the commands of its standard input beside them, as 10.0.0.254.
# Started as process 1 of namespaces of its own, so all of it ends with it.
#
#     unshare --net --mount --pid --fork --kill-child --mount-proc bash two_hosts.sh FOLDER < COMMANDS
set -euo pipefail
folder=$1
mkdir -p /run/sshd /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
ip link add lan type bridge
ip addr add 10.0.0.254/24 dev lan
ip link set lan up
ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
ssh-keygen -q -t ed25519 -N '' -f "$folder/hostkey"

host() { # host NUMBER, inside its namespaces
  local home=$folder/host$1
  mkdir -p "$home"
  touch "$home/.bashrc"
  sed "s#^root:\(.*\):/root:#root:\1:$home:#" /etc/passwd > "$folder/passwd$1"
  mount --bind "$folder/passwd$1" /etc/passwd
  # as Debian has it: the own name leads nowhere
  printf "127.0.0.1 localhost\n127.0.1.1 host$1\n" > "$folder/hosts$1"
  mount --bind "$folder/hosts$1" /etc/hosts
  mount -t tmpfs tmpfs /tmp/ray
  mount -t tmpfs tmpfs /dev/shm
  hostname "host$1"
  ip link set lo up
  until ip link show eth0 &> /dev/null; do sleep 0.1; done
  ip addr add "10.0.0.$1/24" dev eth0
  ip link set eth0 up
  ip route add default via 10.0.0.254  # Ray takes for its address the one that leads to the world
  exec /usr/sbin/sshd -D -e -f /dev/null -h "$folder/hostkey" -o UsePAM=no -o StrictModes=no \
    -o PermitRootLogin=yes -o PidFile=none -o "AuthorizedKeysFile=$folder/key.pub"
}
export -f host
export folder

network() { readlink "/proc/$1/ns/net"; }

for n in 1 2; do
  unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -euc "host $n" \
    &> "$folder/sshd$n.log" < /dev/null &
  ip link add "veth$n" type veth peer name "peer$n"
  ip link set "veth$n" master lan up
  until [[ $(network $!) != $(network $$) ]]; do sleep 0.1; done  # unshare takes its time
  ip link set "peer$n" name eth0 netns $!
done
for n in 1 2; do
  for try in $(seq 60); do
    timeout 1 bash -c ": < /dev/tcp/10.0.0.$n/22" &> /dev/null && break
    [[ $try -lt 60 ]] || { echo "host $n: no sshd answers"; cat "$folder/sshd$n.log"; exit 1; }
    sleep 0.5
  done
done
commands=$(cat)  # all of them at once: ssh reads standard input too
bash -euo pipefail -c "$commands" < /dev/null
