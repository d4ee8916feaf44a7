/* A redirect service on plain socket options: no library, no privilege beyond its cgroup.
 *
 *     cc -Wall -Wextra -pthread -o service service.c
 *     sudo carnet service run NAME -- ./service
 */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* docs/abi.md */
enum {
    WFP = 0x57465000, /* the level, "WFP\0" */
    QUERY_REDIRECT_RECORDS = 220,
    SET_REDIRECT_RECORDS = 222,
    ORIGINAL_DESTINATION = 225,
    REGISTER_LISTENER = 227,
};

struct endpoint {
    uint8_t address[16]; /* network byte order; IPv4 as ::ffff:a.b.c.d */
    uint16_t port;       /* host byte order */
    uint16_t family;     /* AF_INET or AF_INET6 */
    uint32_t zero;
};

struct direction {
    int from, to;
};

/* Copies one direction and passes its end on; an error ends both directions. */
static void *relay(void *argument)
{
    struct direction *way = argument;
    char buffer[65536];
    ssize_t length;

    while ((length = recv(way->from, buffer, sizeof buffer, 0)) > 0) {
        for (ssize_t sent = 0, more; sent < length; sent += more) {
            more = send(way->to, buffer + sent, length - sent, MSG_NOSIGNAL);
            if (more < 0) {
                length = -1;
                break;
            }
        }
        if (length < 0)
            break;
    }
    if (length == 0) {
        shutdown(way->to, SHUT_WR);
    } else {
        shutdown(way->to, SHUT_RDWR);
        shutdown(way->from, SHUT_RDWR);
    }
    return NULL;
}

/* Opens the connection to where the accepted one wanted to go, with its record; -1 if refused. */
static int connect_onwards(int accepted)
{
    char record[2048]; /* always enough */
    socklen_t record_length = sizeof record;
    struct endpoint original;
    socklen_t original_length = sizeof original;

    if (getsockopt(accepted, WFP, QUERY_REDIRECT_RECORDS, record, &record_length) != 0 ||
        getsockopt(accepted, WFP, ORIGINAL_DESTINATION, &original, &original_length) != 0) {
        perror("this connection was not redirected");
        return -1;
    }
    int onwards = socket(original.family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (onwards < 0) {
        perror("socket");
        return -1;
    }
    /* Before connect(): that is where the kernel reads it. */
    if (setsockopt(onwards, WFP, SET_REDIRECT_RECORDS, record, record_length) != 0) {
        perror("set the record");
        close(onwards);
        return -1;
    }
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(original.port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(original.port)};
    memcpy(&v4.sin_addr, original.address + 12, 4);
    memcpy(&v6.sin6_addr, original.address, 16);
    int failed = original.family == AF_INET
        ? connect(onwards, (struct sockaddr *)&v4, sizeof v4)
        : connect(onwards, (struct sockaddr *)&v6, sizeof v6);
    if (failed) {
        perror("connect onwards");
        close(onwards);
        return -1;
    }
    return onwards;
}

static void *serve(void *argument)
{
    int accepted = (int)(intptr_t)argument;
    int onwards = connect_onwards(accepted);

    if (onwards >= 0) {
        struct direction there = {accepted, onwards}, back = {onwards, accepted};
        pthread_t thread;
        if (pthread_create(&thread, NULL, relay, &there) == 0) {
            relay(&back);
            pthread_join(thread, NULL);
        }
        close(onwards);
    }
    close(accepted);
    return NULL;
}

/* Listens on a loopback address, at any port, and tells the kernel that it is this service's. */
static int listen_on(const struct sockaddr *address, socklen_t length)
{
    int listener = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (listener < 0 || bind(listener, address, length) != 0 || listen(listener, 1024) != 0) {
        perror("listen");
        exit(1);
    }
    if (setsockopt(listener, WFP, REGISTER_LISTENER, NULL, 0) != 0) {
        perror("register the listener (is this process in a service's cgroup?)");
        exit(1);
    }
    return listener;
}

int main(void)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct pollfd listeners[] = {
        {.fd = listen_on((struct sockaddr *)&v4, sizeof v4), .events = POLLIN},
        {.fd = listen_on((struct sockaddr *)&v6, sizeof v6), .events = POLLIN},
    };
    puts("ready");
    fflush(stdout);

    while (poll(listeners, 2, -1) >= 0) {
        for (int i = 0; i < 2; i++) {
            pthread_t thread;
            if (!(listeners[i].revents & POLLIN))
                continue;
            int accepted = accept(listeners[i].fd, NULL, NULL);
            if (accepted < 0)
                continue;
            if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)accepted) == 0)
                pthread_detach(thread);
            else
                close(accepted);
        }
    }
    perror("poll");
    return 1;
}
