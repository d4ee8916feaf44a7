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

struct place place_of(const char *text)
{
    struct place place;
    struct sockaddr_in *v4 = (struct sockaddr_in *)&place.address;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&place.address;
    char address[64];
    unsigned port;

    memset(&place, 0, sizeof place);
    MUST(sscanf(text, "%63s %u", address, &port) == 2);
    if (strchr(address, ':')) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((unsigned short)port);
        MUST(inet_pton(AF_INET6, address, &v6->sin6_addr) == 1);
        place.length = sizeof *v6;
    } else {
        v4->sin_family = AF_INET;
        v4->sin_port = htons((unsigned short)port);
        MUST(inet_pton(AF_INET, address, &v4->sin_addr) == 1);
        place.length = sizeof *v4;
    }
    return place;
}

struct place server(int number)
{
    return place_of(lab("udp server %d", number));
}

struct place at_port(struct place place, int port)
{
    /* Both families have it at the same offset. */
    ((struct sockaddr_in *)&place.address)->sin_port = htons((unsigned short)port);
    return place;
}

int port_at(const struct place *place)
{
    return ntohs(((const struct sockaddr_in *)&place->address)->sin_port);
}

int same_place(const struct place *a, const struct place *b)
{
    return a->length == b->length && memcmp(&a->address, &b->address, (size_t)a->length) == 0;
}

SOCKET datagrams(int family)
{
    SOCKET s = socket(family, SOCK_DGRAM, IPPROTO_UDP);
    DWORD patience = PATIENCE_MS;

    MUST(s != INVALID_SOCKET);
    MUST(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, (char *)&patience, sizeof patience) == 0);
    return s;
}

void want(SOCKET s, int level, int option, DWORD on)
{
    MUST(setsockopt(s, level, option, (char *)&on, sizeof on) == 0);
}

SOCKET registered_datagrams(int family, int everywhere)
{
    enum { CARNET = 0x57465000, REGISTER_LISTENER = 227 };
    static const char *const places[2][2] = {{"127.0.0.1 0", "0.0.0.0 0"}, {"::1 0", ":: 0"}};
    struct place own = place_of(places[family == AF_INET6][everywhere]);
    SOCKET s = datagrams(family);
    DWORD only_v6 = !everywhere;

    if (family == AF_INET6) {
        MUST(setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, (char *)&only_v6, sizeof only_v6) == 0);
        want(s, IPPROTO_IPV6, IPV6_WFP_REDIRECT_RECORDS, 1);
        want(s, IPPROTO_IPV6, IPV6_WFP_REDIRECT_CONTEXT, 1);
    }
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_RECORDS, 1);
    want(s, IPPROTO_IP, IP_WFP_REDIRECT_CONTEXT, 1);
    MUST(bind(s, (struct sockaddr *)&own.address, own.length) == 0);
    MUST(setsockopt(s, CARNET, REGISTER_LISTENER, NULL, 0) == 0);
    return s;
}

struct datagram receive_in(SOCKET s, DWORD room, DWORD flags)
{
    struct datagram got;
    union {
        WSACMSGHDR header;
        char bytes[4096];
    } control;
    WSABUF buffer = {sizeof got.text - 1, got.text};
    WSACMSGHDR *object;
    WSAMSG message;
    DWORD length = 0;

    memset(&got, 0, sizeof got);
    memset(&message, 0, sizeof message);
    MUST(room <= sizeof control);
    message.name = (struct sockaddr *)&got.from.address;
    message.namelen = sizeof got.from.address;
    message.lpBuffers = &buffer;
    message.dwBufferCount = 1;
    message.Control.buf = control.bytes;
    message.Control.len = room;
    message.dwFlags = flags;
    if (WSARecvMsg(s, &message, &length, NULL, NULL) != 0) {
        EQUAL(WSAGetLastError(), 0, "a datagram should come");
        return got;
    }
    got.from.length = message.namelen;
    got.flags = message.dwFlags;
    for (object = WSA_CMSG_FIRSTHDR(&message); object; object = WSA_CMSG_NXTHDR(&message, object)) {
        DWORD size = (DWORD)(object->cmsg_len - WSA_CMSG_LEN(0));
        got.objects++;
        got.level = object->cmsg_level;
        if (object->cmsg_type == IP_WFP_REDIRECT_RECORDS) {
            MUST(size <= sizeof got.record);
            memcpy(got.record, WSA_CMSG_DATA(object), size);
            got.record_length = size;
        } else {
            EQUAL(object->cmsg_type, IP_WFP_REDIRECT_CONTEXT);
            MUST(size < sizeof got.context);
            memcpy(got.context, WSA_CMSG_DATA(object), size);
            got.context_length = size;
        }
    }
    return got;
}

struct datagram receive(SOCKET s)
{
    return receive_in(s, 4096, 0);
}

int send_word(SOCKET s, const struct place *to, const char *word, const struct datagram *record)
{
    union {
        WSACMSGHDR header;
        char bytes[MOST_RECORD + 64];
    } control;
    struct place place = *to;
    WSABUF buffer = {(ULONG)strlen(word), (char *)word};
    WSAMSG message;
    DWORD sent = 0;

    memset(&message, 0, sizeof message);
    message.name = place.length ? (struct sockaddr *)&place.address : NULL;
    message.namelen = place.length;
    message.lpBuffers = &buffer;
    message.dwBufferCount = 1;
    if (record) {
        int v4 = place.length != sizeof(struct sockaddr_in6);
        memset(&control, 0, sizeof control);
        control.header.cmsg_len = WSA_CMSG_LEN(record->record_length);
        control.header.cmsg_level = v4 ? IPPROTO_IP : IPPROTO_IPV6;
        control.header.cmsg_type = IP_WFP_REDIRECT_RECORDS;
        memcpy(WSA_CMSG_DATA(&control.header), record->record, record->record_length);
        message.Control.buf = control.bytes;
        message.Control.len = WSA_CMSG_SPACE(record->record_length);
    }
    if (WSASendMsg(s, &message, 0, &sent, NULL, NULL) != 0)
        return WSAGetLastError();
    EQUAL(sent, strlen(word));
    return 0;
}

int is_answered(SOCKET s, const char *word)
{
    char answer[128] = "", due[80];
    int length = recv(s, answer, sizeof answer - 1, 0);

    snprintf(due, sizeof due, "%s reached ", word);
    return length > 0 && strncmp(answer, due, strlen(due)) == 0;
}

unsigned long long flow_from(const struct place *from)
{
    enum { CARNET = 0x57465000, FLOW = 228 };
    unsigned long long flow[5] = {0};
    int length = sizeof flow;
    SOCKET s = datagrams(from->address.ss_family);

    EQUAL(connect(s, (const struct sockaddr *)&from->address, from->length), 0);
    EQUAL(getsockopt(s, CARNET, FLOW, (char *)flow, &length), 0, "error %d", WSAGetLastError());
    closesocket(s);
    return flow[0];
}
