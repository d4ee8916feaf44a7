#include "suite.h"

/* Per thread, as completion routines are. */
static _Thread_local int noted;
struct completion journal[64];

__attribute__((constructor)) static void start_winsock(void)
{
    WSADATA data;

    MUST(WSAStartup(MAKEWORD(2, 2), &data) == 0);
}

WSATHREADID own_thread(void)
{
    static _Thread_local WSATHREADID thread;
    int error;

    if (!thread.ThreadHandle)
        MUST(WPUOpenCurrentThread(&thread, &error) == 0);
    return thread;
}

int make(enum entry entry, struct call call, int *error)
{
    enum { BEFORE = 4711 };
    int result, code = BEFORE;

    WSASetLastError(BEFORE);
    if (entry == BY_WSA) {
        result = WSAIoctl(call.s, call.code, call.in, call.in_size, call.out, call.out_size,
                          call.returned, call.overlapped, call.routine);
        code = WSAGetLastError();
    } else {
        WSATHREADID thread = own_thread();
        WSASetLastError(BEFORE);
        result = WSPIoctl(call.s, call.code, call.in, call.in_size, call.out, call.out_size,
                          call.returned, call.overlapped, call.routine, &thread, &code);
        /* The structure is the caller's again (S24). */
        memset(&thread, 0xA5, sizeof thread);
        EQUAL(WSAGetLastError(), BEFORE, "WSPIoctl and the last error");
        if (result == 0)
            code = 0;
    }
    if (result == 0)
        EQUAL(code, 0, "the code of a success");
    else
        EQUAL(result, SOCKET_ERROR, "the result of a failure");
    *error = code;
    return result;
}

int error_of(enum entry entry, struct call call)
{
    int error;

    make(entry, call, &error);
    return error;
}

SOCKET overlapped_socket(void)
{
    SOCKET s = WSASocketW(AF_INET, SOCK_STREAM, IPPROTO_TCP, NULL, 0, WSA_FLAG_OVERLAPPED);

    MUST(s != INVALID_SOCKET);
    return s;
}

SOCKET plain_socket(void)
{
    SOCKET s = WSASocketW(AF_INET, SOCK_STREAM, IPPROTO_TCP, NULL, 0, 0);

    MUST(s != INVALID_SOCKET);
    return s;
}

static SOCKET listening(int family)
{
    struct sockaddr_storage address;
    struct sockaddr_in *v4 = (struct sockaddr_in *)&address;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&address;
    int length = family == AF_INET ? sizeof *v4 : sizeof *v6;
    SOCKET s = socket(family, SOCK_STREAM, IPPROTO_TCP);

    memset(&address, 0, sizeof address);
    if (family == AF_INET) {
        v4->sin_family = AF_INET;
        v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else {
        v6->sin6_family = AF_INET6;
        v6->sin6_addr.s6_addr[15] = 1;
    }
    MUST(s != INVALID_SOCKET);
    MUST(bind(s, (struct sockaddr *)&address, length) == 0);
    MUST(listen(s, 64) == 0);
    return s;
}

SOCKET listener_v4(void)
{
    static SOCKET listener = INVALID_SOCKET;

    if (listener == INVALID_SOCKET) {
        listener = listening(AF_INET);
        lab("register");
    }
    return listener;
}

SOCKET redirected(void)
{
    SOCKET listener = listener_v4(), accepted;

    lab("connect 4");
    accepted = accept(listener, NULL, NULL);
    MUST(accepted != INVALID_SOCKET);
    return accepted;
}

SOCKET redirected_v6(void)
{
    static SOCKET listener = INVALID_SOCKET;
    SOCKET accepted;

    if (listener == INVALID_SOCKET) {
        listener = listening(AF_INET6);
        lab("register");
    }
    lab("connect 6");
    accepted = accept(listener, NULL, NULL);
    MUST(accepted != INVALID_SOCKET);
    return accepted;
}

unsigned short port_of(SOCKET listener)
{
    struct sockaddr_in address;
    int length = sizeof address;

    MUST(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    return ntohs(address.sin_port);
}

struct sockaddr_in destination(void)
{
    struct sockaddr_in address;
    char text[64];
    unsigned port;

    memset(&address, 0, sizeof address);
    MUST(sscanf(lab("destination 4"), "%63s %u", text, &port) == 2);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)port);
    MUST(inet_pton(AF_INET, text, &address.sin_addr) == 1);
    return address;
}

DWORD record_of(SOCKET accepted, unsigned char record[MOST_RECORD])
{
    DWORD length = 0;
    int result = WSAIoctl(accepted, QUERY_RECORDS, NULL, 0, record, MOST_RECORD, &length, NULL,
                          NULL);

    MUST(result == 0);
    MUST(length > 0);
    return length;
}

struct call set_call(SOCKET s, unsigned char *record, DWORD length, DWORD *returned)
{
    struct call call = {s, SET_RECORDS, record, length, NULL, 0, returned, NULL, NULL};

    *returned = UNTOUCHED;
    return call;
}

struct call query_call(SOCKET s, DWORD code, void *out, DWORD size, DWORD *returned)
{
    struct call call = {s, code, NULL, 0, out, size, returned, NULL, NULL};

    *returned = UNTOUCHED;
    return call;
}

int echoes(SOCKET connected)
{
    static const char text[] = "is anybody there?";
    char answer[sizeof text] = "";
    int length = 0, more;

    if (send(connected, text, sizeof text, 0) != sizeof text)
        return 0;
    while (length < (int)sizeof text) {
        more = recv(connected, answer + length, (int)sizeof text - length, 0);
        if (more <= 0)
            return 0;
        length += more;
    }
    return memcmp(text, answer, sizeof text) == 0;
}

WSAOVERLAPPED fresh(WSAEVENT event)
{
    WSAOVERLAPPED overlapped;

    memset(&overlapped, 0, sizeof overlapped);
    overlapped.Internal = UNTOUCHED;
    overlapped.InternalHigh = UNTOUCHED;
    overlapped.hEvent = event;
    return overlapped;
}

int is_fresh(const WSAOVERLAPPED *overlapped)
{
    return overlapped->Internal == UNTOUCHED && overlapped->InternalHigh == UNTOUCHED;
}

int signalled(WSAEVENT event, DWORD milliseconds)
{
    return WSAWaitForMultipleEvents(1, &event, FALSE, milliseconds, FALSE) == WSA_WAIT_EVENT_0;
}

void CALLBACK note(DWORD error, DWORD bytes, LPWSAOVERLAPPED overlapped, DWORD flags)
{
    struct completion entry = {error, bytes, flags, overlapped, this_thread()};

    if (noted < 64)
        journal[noted] = entry;
    noted++;
}

int completions(int count)
{
    unsigned long long until = now_ms() + PATIENCE_MS;

    while (noted < count && now_ms() < until)
        SleepEx(50, TRUE);
    return noted;
}

void forget(void)
{
    noted = 0;
    memset(journal, 0, sizeof journal);
}
