#define _GNU_SOURCE
#include "harness.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static struct row *first;
static const struct row *current;
static int failures;
/* Checks are made in any thread. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void contract_add(struct row *row)
{
    struct row **end = &first;

    while (*end)
        end = &(*end)->next;
    *end = row;
}

static void fail(const char *file, int line, const char *text, const char *format, va_list details)
{
    const char *base = strrchr(file, '/');

    pthread_mutex_lock(&mutex);
    failures++;
    printf("failed %s %s:%d: %s", current->name, base ? base + 1 : file, line, text);
    if (format[1]) {
        fputs(" [", stdout);
        vprintf(format + 1, details);
        putchar(']');
    }
    putchar('\n');
    pthread_mutex_unlock(&mutex);
}

void contract_failed(const char *file, int line, const char *condition, const char *format, ...)
{
    va_list details;

    va_start(details, format);
    fail(file, line, condition, format, details);
    va_end(details);
}

void contract_unequal(const char *file, int line, const char *what, long long found,
                      long long expected, const char *format, ...)
{
    char text[400];
    va_list details;

    snprintf(text, sizeof text, "%s is %lld, not %lld", what, found, expected);
    va_start(details, format);
    fail(file, line, text, format, details);
    va_end(details);
}

void contract_give_up(const char *file, int line, const char *condition)
{
    contract_failed(file, line, condition, " the program ends here, errno %d", errno);
    exit(2);
}

const char *lab(const char *format, ...)
{
    static char answer[8192];
    va_list arguments;
    size_t length = 0;

    fputs("lab ", stdout);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    while (length + 1 < sizeof answer && read(STDIN_FILENO, answer + length, 1) == 1) {
        if (answer[length] == '\n') {
            answer[length] = '\0';
            return answer;
        }
        length++;
    }
    fputs("the lab does not answer\n", stderr);
    exit(2);
}

size_t from_hexadecimal(const char *digits, unsigned char *bytes, size_t room)
{
    size_t length = 0;
    unsigned byte;

    while (length < room && sscanf(digits + 2 * length, "%2x", &byte) == 1)
        bytes[length++] = (unsigned char)byte;
    return length;
}

static unsigned char *pages(int count)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *memory = mmap(NULL, count * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0);

    MUST(memory != MAP_FAILED);
    return memory;
}

unsigned char *border(void)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char *memory = pages(2);

    MUST(mprotect(memory + size, size, PROT_NONE) == 0);
    return memory + size;
}

unsigned char *read_only(const void *bytes, size_t length)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char *memory = pages(1);

    MUST(length <= size);
    memcpy(memory, bytes, length);
    MUST(mprotect(memory, size, PROT_READ) == 0);
    return memory;
}

void *unmapped(void)
{
    unsigned char *memory = pages(1);

    MUST(munmap(memory, (size_t)sysconf(_SC_PAGESIZE)) == 0);
    return memory;
}

struct thread {
    pthread_t id;
    void (*run)(void *);
    void *argument;
};

static void *run_thread(void *argument)
{
    struct thread *thread = argument;

    thread->run(thread->argument);
    return NULL;
}

struct thread *start_thread(void (*run)(void *), void *argument)
{
    struct thread *thread = malloc(sizeof *thread);

    MUST(thread);
    thread->run = run;
    thread->argument = argument;
    MUST(pthread_create(&thread->id, NULL, run_thread, thread) == 0);
    return thread;
}

void wait_for_thread(struct thread *thread)
{
    MUST(pthread_join(thread->id, NULL) == 0);
    free(thread);
}

unsigned long this_thread(void)
{
    return (unsigned long)syscall(SYS_gettid);
}

static void do_nothing(int signal)
{
    (void)signal;
}

void interrupt(struct thread *thread)
{
    struct sigaction action = {.sa_handler = do_nothing};

    MUST(sigaction(SIGUSR1, &action, NULL) == 0);
    MUST(pthread_kill(thread->id, SIGUSR1) == 0);
}

void pause_ms(unsigned milliseconds)
{
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000L};

    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

unsigned long long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000 + (unsigned long long)now.tv_nsec / 1000000;
}

void make_pipe(int ends[2])
{
    MUST(pipe2(ends, O_CLOEXEC) == 0);
}

int open_file(void)
{
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

    MUST(file >= 0);
    return file;
}

int raw_socket(int family, int type, int protocol)
{
    int descriptor = socket(family, type | SOCK_CLOEXEC, protocol);

    MUST(descriptor >= 0);
    return descriptor;
}

int duplicate(int descriptor)
{
    int copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);

    MUST(copy >= 0);
    return copy;
}

void raw_close(int descriptor)
{
    MUST(close(descriptor) == 0);
}

int is_open(int descriptor)
{
    return fcntl(descriptor, F_GETFD) >= 0;
}

unsigned long long cookie_of(int descriptor)
{
    unsigned long long cookie = 0;
    socklen_t length = sizeof cookie;

    MUST(getsockopt(descriptor, SOL_SOCKET, SO_COOKIE, &cookie, &length) == 0);
    return cookie;
}

void set_environment(const char *name, const char *value)
{
    MUST(setenv(name, value, 1) == 0);
}

void become_nobody(void)
{
    MUST(setgroups(0, NULL) == 0);
    MUST(setresgid(65534, 65534, 65534) == 0);
    MUST(setresuid(65534, 65534, 65534) == 0);
}

int main(void)
{
    int failed = 0;

    /* A row may wait for ever; a test that is killed is not to leave it behind. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    for (current = first; current; current = current->next) {
        failures = 0;
        printf("begin %s\n", current->name);
        current->run();
        if (failures == 0)
            printf("ok %s\n", current->name);
        else
            failed = 1;
    }
    puts("end");
    return failed;
}
