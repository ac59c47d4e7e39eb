/* The program that the benches take checkpoints of, and the two things they are compared with.
 *
 *   target run MIB PROCESSES THREADS DESCRIPTORS VMAS   a process tree of that shape
 *   target floor MIB                                    what a rollback cannot do without, in one process
 *   target template MIB                                 kill a process, fork another from a frozen template
 *
 * All print READY and obey lines on standard input; each answers with one line. Times are in microseconds. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define BLOCK (2ul << 20)
#define MUST(call)                                                                                                     \
	({                                                                                                             \
		__typeof__(call) result_ = (call);                                                                     \
		if ((long)result_ == -1) {                                                                             \
			fprintf(stderr, "target: %s: %s\n", #call, strerror(errno));                                   \
			exit(1);                                                                                       \
		}                                                                                                      \
		result_;                                                                                               \
	})

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* Memory in 4 KiB pages that are all there, each with its number in it. */
static char *populate(size_t pages)
{
	char *at = MUST(mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	MUST(madvise(at, pages * PAGE, MADV_NOHUGEPAGE));
	for (size_t page = 0; page < pages; page++)
		*(uint64_t *)(at + page * PAGE) = page;
	return at;
}

/* Changes `count` pages spread over all of them: the same every time, or (`d -COUNT`) others each time. */
static void dirty(char *at, size_t pages, long count, uint64_t value)
{
	static size_t shift;
	if (count < 0) {
		count = -count;
		shift += 7;
	}
	for (size_t done = 0; done < (size_t)count && done < pages; done++)
		*(uint64_t *)(at + (done * pages / count + shift) % pages * PAGE + 8) = value;
}

static void *wait_for_ever(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void run(char **argument)
{
	size_t pages = strtoul(argument[0], NULL, 0) << 8;
	int processes = atoi(argument[1]), threads = atoi(argument[2]), descriptors = atoi(argument[3]),
	    vmas = atoi(argument[4]);
	char *memory = populate(pages);
	for (int made = 3; made < descriptors; made++)
		MUST(open("/proc/self/exe", O_RDONLY));
	for (int made = 0; made < vmas; made++)
		MUST(mmap(NULL, PAGE, made % 2 ? PROT_READ : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			  0));
	for (int made = 1; made < processes; made++)
		if (MUST(fork()) == 0) {
			MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
			/* Of its own, if so asked. */
			if (getenv("TARGET_OWN_MEMORY"))
				dirty(memory, pages, (long)pages, 1);
			wait_for_ever(NULL);
		}
	for (int made = 1; made < threads; made++) {
		pthread_t thread;
		pthread_attr_t small;
		pthread_attr_init(&small);
		pthread_attr_setstacksize(&small, 64 << 10);
		if (pthread_create(&thread, &small, wait_for_ever, NULL)) {
			fprintf(stderr, "target: no thread %d\n", made);
			exit(1);
		}
	}
	MUST(write(1, "READY\n", 6));
	char line[64], answer[64];
	for (uint64_t round = 1;; round++) {
		ssize_t got = MUST(read(0, line, sizeof line - 1));
		if (got == 0)
			exit(0);
		line[got] = 0;
		double result = 0;
		if (line[0] == 'd') {
			dirty(memory, pages, strtol(line + 1, NULL, 0), round + (uint64_t)now());
		} else if (line[0] == 'f') { /* a bare fork of this process */
			double began = now();
			pid_t child = fork();
			result = now() - began;
			if (child == 0)
				_exit(0);
			MUST(child);
			MUST(waitpid(child, NULL, 0));
		}
		int length = snprintf(answer, sizeof answer, "%.1f\n", result);
		MUST(write(1, answer, length));
	}
}

/* PAGEMAP_SCAN, include/uapi/linux/fs.h of Linux 6.7; older headers lack it. */
struct region {
	uint64_t start, end, categories;
};
struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};
#define PAGEMAP_SCAN_ _IOWR('f', 16, struct scan)
#define WRITTEN 2
#define PRESENT 8

static size_t scan(int pagemap, char *from, char *to, int arm, struct region *found, size_t room)
{
	struct scan arguments = {
		.size = sizeof arguments,
		.flags = arm ? 1 : 0,
		.start = (uint64_t)from,
		.end = (uint64_t)to,
		.vec = (uint64_t)found,
		.vec_len = room,
		.mask = WRITTEN | PRESENT,
		.returned = WRITTEN,
	};
	return MUST(ioctl(pagemap, PAGEMAP_SCAN_, &arguments));
}

static int track(char *at, size_t length)
{
	int uffd = MUST((int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | 1 << 15 };
	MUST(ioctl(uffd, UFFDIO_API, &api));
	struct uffdio_register range = { .range = { (uint64_t)at, length }, .mode = UFFDIO_REGISTER_MODE_WP };
	MUST(ioctl(uffd, UFFDIO_REGISTER, &range));
	return uffd;
}

/* Stops another process that waits in a system call, reads and writes its registers, lets it go. */
static double stop_and_registers(pid_t other)
{
	static char xstate[64 << 10];
	struct user_regs_struct registers;
	double began = now();
	MUST(ptrace(PTRACE_INTERRUPT, other, 0, 0));
	MUST(waitpid(other, NULL, __WALL));
	struct iovec area = { xstate, sizeof xstate };
	MUST(ptrace(PTRACE_GETREGS, other, 0, &registers));
	MUST(ptrace(PTRACE_GETREGSET, other, 0x202, &area));
	MUST(ptrace(PTRACE_SETREGSET, other, 0x202, &area));
	MUST(ptrace(PTRACE_SETREGS, other, 0, &registers));
	MUST(ptrace(PTRACE_CONT, other, 0, 0));
	return now() - began;
}

static void floor_(char **argument)
{
	size_t pages = strtoul(argument[0], NULL, 0) << 8, room = 1 << 20;
	char *memory = populate(pages), *kept = populate(pages), *end = memory + pages * PAGE;
	struct region *found = calloc(room, sizeof *found);
	memset(found, 1, room * sizeof *found);
	pid_t other = MUST(fork());
	if (other == 0) {
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
		wait_for_ever(NULL);
	}
	MUST(ptrace(PTRACE_SEIZE, other, 0, 0));
	int pagemap = MUST(open("/proc/self/pagemap", O_RDONLY));
	track(memory, pages * PAGE);
	for (char *at = memory; at < end; at += BLOCK)
		scan(pagemap, at, at + BLOCK < end ? at + BLOCK : end, 1, found, room);
	MUST(write(1, "READY\n", 6));
	char line[64], answer[64];
	for (uint64_t round = 1;; round++) {
		ssize_t got = MUST(read(0, line, sizeof line - 1));
		if (got == 0)
			exit(0);
		line[got] = 0;
		dirty(memory, pages, strtol(line + 1, NULL, 0), round);
		double took = stop_and_registers(other), began = now();
		size_t regions = scan(pagemap, memory, end, 0, found, room);
		for (size_t region = 0; region < regions; region++) {
			char *start = (char *)found[region].start;
			memcpy(start, kept + (start - memory), found[region].end - found[region].start);
		}
		/* Only the blocks that had dirty pages, as design asks: runs of neighbours in one scan. */
		struct region rearmed[64];
		for (size_t region = 0; region < regions;) {
			char *from = memory + (found[region].start - (uint64_t)memory) / BLOCK * BLOCK, *to = from;
			for (; region < regions && (char *)found[region].start < to + BLOCK; region++)
				to = memory + (found[region].end - 1 - (uint64_t)memory) / BLOCK * BLOCK + BLOCK;
			if (to > end)
				to = end;
			/* The room for results bounds one call, so it is repeated until nothing is left. */
			while (scan(pagemap, from, to, 1, rearmed, 64) == 64)
				from = (char *)rearmed[63].end;
		}
		took += now() - began;
		int length = snprintf(answer, sizeof answer, "%.1f\n", took);
		MUST(write(1, answer, length));
	}
}

/* The template: populated, frozen in a read; forks a sibling of itself when told. */
static void template_process(size_t pages, int commands, int answers)
{
	char *memory = populate(pages);
	MUST(write(answers, "r", 1));
	for (;;) {
		long count;
		if (MUST(read(commands, &count, sizeof count)) == 0)
			_exit(0);
		long child = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
		MUST(child);
		if (child == 0) {
			MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
			MUST(write(answers, "f", 1));
			dirty(memory, pages, count, count);
			MUST(write(answers, "d", 1));
			wait_for_ever(NULL);
		}
	}
}

static void template_(char **argument)
{
	size_t pages = strtoul(argument[0], NULL, 0) << 8;
	int commands[2], answers[2];
	MUST(pipe(commands));
	MUST(pipe(answers));
	pid_t template = MUST(fork());
	if (template == 0) {
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
		close(commands[1]);
		template_process(pages, commands[0], answers[1]);
	}
	close(commands[0]);
	char letter;
	MUST(read(answers[0], &letter, 1));
	long none = 0;
	MUST(write(commands[1], &none, sizeof none));
	MUST(read(answers[0], &letter, 1));
	MUST(read(answers[0], &letter, 1));
	MUST(write(1, "READY\n", 6));
	char line[64], answer[64];
	for (;;) {
		ssize_t got = MUST(read(0, line, sizeof line - 1));
		if (got == 0)
			exit(0);
		line[got] = 0;
		long count = strtol(line + 1, NULL, 0);
		pid_t victim = 0;
		/* The one child besides the template. */
		char path[64];
		snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
		FILE *children = fopen(path, "r");
		int pid;
		while (children && fscanf(children, "%d", &pid) == 1)
			if (pid != template)
				victim = pid;
		if (children)
			fclose(children);
		double began = now();
		MUST(kill(victim, SIGKILL));
		MUST(waitpid(victim, NULL, 0));
		MUST(write(commands[1], &count, sizeof count));
		MUST(read(answers[0], &letter, 1));
		double took = now() - began;
		/* What the program then pays for writing to these pages again is not counted. */
		MUST(read(answers[0], &letter, 1));
		int length = snprintf(answer, sizeof answer, "%.1f\n", took);
		MUST(write(1, answer, length));
	}
}

int main(int count, char **argument)
{
	if (count == 7 && !strcmp(argument[1], "run"))
		run(argument + 2);
	else if (count == 3 && !strcmp(argument[1], "floor"))
		floor_(argument + 2);
	else if (count == 3 && !strcmp(argument[1], "template"))
		template_(argument + 2);
	fprintf(stderr, "usage: target run MIB PROCESSES THREADS DESCRIPTORS VMAS | floor MIB | template MIB\n");
	return 2;
}
