set -u
S="target/debug/snapback --root /tmp/h/roots/run/root"
python3 -c "
import time,os
x=[bytes([i%256])*100000 for i in range(100)]
n=0
while True:
    n+=1
    open('/tmp/h/roots/run/out','a').write('%d %d\n'%(os.getpid(),n)); time.sleep(0.05)
" </dev/null >/dev/null 2>&1 &
P=$!
sleep 0.5
ps -o pid,ppid,pgid,sid,tty,stat,cmd -p $P
$S checkpoint --pid $P || exit 1
for i in 1 2 3; do
sleep 0.3; tail -1 /tmp/h/roots/run/out
kill -9 $P; wait $P 2>/dev/null; sleep 0.1
$S checkpoints --pid $P
$S checkpoint --pid $P
$S rollback --verify --pid $P; echo rc $?
ps -o pid,ppid,pgid,sid,tty,stat,cmd -p $P
sleep 0.3; tail -1 /tmp/h/roots/run/out
P2=$P
# reaped by whom?
kill -0 $P || break
$S checkpoint --pid $P --name two
$S checkpoints --pid $P
python3 - $P <<'X'
import os,sys,time,signal
p=int(sys.argv[1]); os.kill(p,9)
while os.path.exists('/proc/%d'%p): time.sleep(0.01)
X
$S rollback --verify --pid $P --to two; echo rc $?
done
$S release --all --pid $P
kill -9 $P
ls run/root/.keepers
