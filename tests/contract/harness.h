/* The harness of the contract suite: rows, checks, and the lab that the programs run in.
 *
 * A program is a list of rows. A row names the clauses that it shows; `cargo xtask contract` reads
 * the ROW lines of these files, so each stands on a line of its own. No system header is included
 * here: the programs include the library's, and see nothing of Linux but what is declared below.
 */
#ifndef CARNET_CONTRACT_HARNESS_H
#define CARNET_CONTRACT_HARNESS_H

#include <stddef.h>

/* One row: `clauses` are numbers as "S31 W13", `name` is the function's. */
struct row {
    const char *name;
    const char *clauses;
    void (*run)(void);
    struct row *next;
};

void contract_add(struct row *row);

#define ROW(function, clause_list)                                                                 \
    static void function(void);                                                                    \
    __attribute__((constructor)) static void add_##function(void)                                  \
    {                                                                                              \
        static struct row row = {#function, clause_list, function, NULL};                          \
        contract_add(&row);                                                                        \
    }                                                                                              \
    static void function(void)

/* Notes that the row has failed, unless the condition holds; the row goes on. */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition))                                                                          \
            contract_failed(__FILE__, __LINE__, #condition, " " __VA_ARGS__);                      \
    } while (0)

/* The same for two numbers, which are shown. */
#define EQUAL(found, expected, ...)                                                                \
    do {                                                                                           \
        long long found_ = (long long)(found), expected_ = (long long)(expected);                  \
        if (found_ != expected_)                                                                   \
            contract_unequal(__FILE__, __LINE__, #found, found_, expected_, " " __VA_ARGS__);      \
    } while (0)

/* Ends the program when a row cannot even begin. */
#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition))                                                                          \
            contract_give_up(__FILE__, __LINE__, #condition);                                      \
    } while (0)

/* A format begins with a blank, so that it is never empty. */
void contract_failed(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
void contract_unequal(const char *file, int line, const char *what, long long found,
                      long long expected, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
void contract_give_up(const char *file, int line, const char *condition)
    __attribute__((noreturn));

/* Asks the lab for something and gives its answer, which lives until the next call:
 *
 *   destination     address and port of the echo server, of the family "4" or "6"
 *   register        the listeners of this process become its service's
 *   connect 4|6     a client connects to the destination, and is redirected
 *   direct PORT     a client that nobody redirects connects to this port of 127.0.0.1
 *   close           all clients close their connections
 *   record stranger a record that was delivered to another service, in hexadecimal digits
 *   record foreign  a record of another instance
 *   count NAME      one of the engine's counters
 *   detach, attach  the engine goes down; it comes up again, with the same service
 *   udp server N    address and port of a UDP server at the destination, which answers with what it gets
 *                   and where it was reached: N is even for IPv4, odd for IPv6, less than 8
 *   udp open 4|6    a client makes a UDP socket: its number
 *   udp bind SOCKET PORT
 *                   binds it to the loopback address: the port
 *   udp connect SOCKET ADDRESS PORT
 *   udp send SOCKET ADDRESS PORT TEXT
 *                   sendto() of a word
 *   udp write SOCKET TEXT
 *                   send() of a word
 *   udp read SOCKET address and port that a datagram comes from, and what it says
 *   udp close SOCKET
 *   udp onward ADDRESS PORT COUNT
 *                   the flows that went onwards to so many ports, one to each: the numbers, those that follow one another
 *                   once
 *   leave           this process is moved out of the service's cgroup
 */
const char *lab(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Reads hexadecimal digits; gives the number of bytes. */
size_t from_hexadecimal(const char *digits, unsigned char *bytes, size_t room);

/* Memory of two pages, of which the second cannot be accessed: gives its border. */
unsigned char *border(void);
/* Some memory that can be read but not written, and holds these bytes. */
unsigned char *read_only(const void *bytes, size_t length);
/* An address that is mapped nowhere. */
void *unmapped(void);

/* Threads. What was started is to be waited for. */
struct thread;
struct thread *start_thread(void (*run)(void *), void *argument);
void wait_for_thread(struct thread *thread);
/* The number of the calling thread. */
unsigned long this_thread(void);
/* Sends this thread a signal that interrupts its system call, and does nothing else. */
void interrupt(struct thread *thread);

/* Sleeps, not alertably. */
void pause_ms(unsigned milliseconds);
/* A clock that only goes forward. */
unsigned long long now_ms(void);

/* A pipe, a regular file, and the ends of them, as the numbers that Linux has. */
void make_pipe(int ends[2]);
int open_file(void);
/* socket(2) itself, past the library. */
int raw_socket(int family, int type, int protocol);
/* dup(2) of a descriptor. */
int duplicate(int descriptor);
/* close(2) itself, past the library. */
void raw_close(int descriptor);
/* Whether the descriptor is open. */
int is_open(int descriptor);
/* The socket's cookie. */
unsigned long long cookie_of(int descriptor);

/* setenv(3). */
void set_environment(const char *name, const char *value);

/* Becomes an ordinary user without capabilities, for good. */
void become_nobody(void);

#endif
