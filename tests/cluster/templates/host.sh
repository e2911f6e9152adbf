# The first process of a host, already inside its namespaces: a name, a /run and a /dev/shm of its own; then it waits.
# Arguments: the host's name, the cluster's folder, the file to make when it is ready.
set -e
name=$1 folder=$2 ready=$3
hostname "$name"
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/munge /run/spool
# DeepSpeed's all-reduce in shared memory must not reach another host.
mount -t tmpfs -o size=512m tmpfs /dev/shm
echo "$name" >/run/hostname
# Names that are not in /etc/hosts fail at once instead of waiting for a name server.
echo 'nameserver 127.0.0.1' >/run/resolv.conf
cp "$folder/hosts" /run/hosts
for file in hostname resolv.conf hosts; do mount --bind "/run/$file" "/etc/$file"; done
for directory in ssh slurm; do
    if [ -d "/etc/$directory" ] && [ -d "$folder/etc/$directory" ]; then mount --bind "$folder/etc/$directory" "/etc/$directory"; fi
done
ip link set lo up
: >"$ready"
trap : TERM INT HUP
while :; do
    sleep 3600 &
    wait $! || true
done
