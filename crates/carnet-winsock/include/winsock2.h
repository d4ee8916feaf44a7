/*
 * Windows Sockets 2 on Carnet's engine: the part that a redirect service needs.
 *
 * Names, signatures, structures, control codes and error codes are Windows'. Address families,
 * levels, options and flags of the socket functions have Windows' names and Linux's numbers, and
 * the address structures are those of the C library, so that a SOCKET can be handed to any other
 * library as the file descriptor that it is.
 *
 * Every function that fails leaves its reason in WSAGetLastError(). See docs/winsock.md.
 *
 * Carnet, https://github.com/carnet-project/carnet; MIT or Apache-2.0.
 */
#ifndef CARNET_WINSOCK_WINSOCK2_H
#define CARNET_WINSOCK_WINSOCK2_H

/* How many sockets an fd_set holds: the program's own FD_SETSIZE, if it defined one before this. */
#if defined(FD_SETSIZE) && !defined(_SYS_SELECT_H)
enum { CARNET_WINSOCK_FD_SETSIZE = FD_SETSIZE };
#undef FD_SETSIZE
#else
enum { CARNET_WINSOCK_FD_SETSIZE = 64 };
#endif

/* First the C library's, since some of their names are redefined below. */
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "windows.h"

#ifdef __cplusplus
extern "C" {
#endif

#define WSAAPI
#define WSAEVENT HANDLE
#define LPWSAEVENT LPHANDLE
#define WSAOVERLAPPED OVERLAPPED
typedef struct _OVERLAPPED *LPWSAOVERLAPPED;

/* ---- Sockets and addresses ------------------------------------------------------------------- */

/* A file descriptor. */
typedef UINT_PTR SOCKET;
#define INVALID_SOCKET ((SOCKET)(~0))
#define SOCKET_ERROR (-1)

/* An int on Windows. A macro, since sys/socket.h has the name. */
#define socklen_t int

typedef USHORT ADDRESS_FAMILY;
typedef struct sockaddr SOCKADDR, *PSOCKADDR, *LPSOCKADDR;
typedef struct sockaddr_in SOCKADDR_IN, *PSOCKADDR_IN, *LPSOCKADDR_IN;
typedef struct sockaddr_storage SOCKADDR_STORAGE, *PSOCKADDR_STORAGE, *LPSOCKADDR_STORAGE;
typedef struct in_addr IN_ADDR, *PIN_ADDR, *LPIN_ADDR;
typedef struct timeval TIMEVAL, *PTIMEVAL, *LPTIMEVAL;
typedef struct hostent HOSTENT, *PHOSTENT, *LPHOSTENT;
typedef struct linger LINGER, *PLINGER, *LPLINGER;

#define SD_RECEIVE 0
#define SD_SEND 1
#define SD_BOTH 2

/* Nobody else may bind the address: how a Linux socket is anyway. */
#define SO_EXCLUSIVEADDRUSE ((int)(~SO_REUSEADDR))

/* ---- Starting and ending --------------------------------------------------------------------- */

#define WSADESCRIPTION_LEN 256
#define WSASYS_STATUS_LEN 128

typedef struct WSAData {
    WORD wVersion;
    WORD wHighVersion;
    unsigned short iMaxSockets;
    unsigned short iMaxUdpDg;
    char *lpVendorInfo;
    char szDescription[WSADESCRIPTION_LEN + 1];
    char szSystemStatus[WSASYS_STATUS_LEN + 1];
} WSADATA, *LPWSADATA;

int WSAStartup(WORD wVersionRequested, LPWSADATA lpWSAData);
int WSACleanup(void);

int WSAGetLastError(void);
void WSASetLastError(int iError);

/* ---- Control codes --------------------------------------------------------------------------- */

/* sys/ioctl.h has these names with other values. */
#undef IOC_VOID
#undef IOC_OUT
#undef IOC_IN
#undef IOC_INOUT
#undef FIONREAD
#undef FIONBIO
#undef FIOASYNC
#define IOC_VOID 0x20000000u
#define IOC_OUT 0x40000000u
#define IOC_IN 0x80000000u
#define IOC_INOUT (IOC_IN | IOC_OUT)
#define IOC_UNIX 0x00000000u
#define IOC_WS2 0x08000000u
#define IOC_PROTOCOL 0x10000000u
#define IOC_VENDOR 0x18000000u

#define _WSAIO(x, y) (IOC_VOID | (x) | (y))
#define _WSAIOR(x, y) (IOC_OUT | (x) | (y))
#define _WSAIOW(x, y) (IOC_IN | (x) | (y))
#define _WSAIORW(x, y) (IOC_INOUT | (x) | (y))

/* How many bytes can be read at once: a u_long out. */
#define FIONREAD 0x4004667Fu
/* Non-blocking mode on or off: a u_long in. */
#define FIONBIO 0x8004667Eu
/* Known, and not supported. */
#define FIOASYNC 0x8004667Du
/* Cancels the overlapped operations of a socket. */
#define SIO_FLUSH _WSAIO(IOC_WS2, 4)
/* A GUID in, the address of an extension function out: WSARecvMsg, WSASendMsg. */
#define SIO_GET_EXTENSION_FUNCTION_POINTER _WSAIORW(IOC_WS2, 6)

int ioctlsocket(SOCKET s, long cmd, u_long *argp);

typedef void(CALLBACK *LPWSAOVERLAPPED_COMPLETION_ROUTINE)(DWORD dwError, DWORD cbTransferred,
                                                          LPWSAOVERLAPPED lpOverlapped,
                                                          DWORD dwFlags);

int WSAIoctl(SOCKET s, DWORD dwIoControlCode, LPVOID lpvInBuffer, DWORD cbInBuffer,
             LPVOID lpvOutBuffer, DWORD cbOutBuffer, LPDWORD lpcbBytesReturned,
             LPWSAOVERLAPPED lpOverlapped,
             LPWSAOVERLAPPED_COMPLETION_ROUTINE lpCompletionRoutine);

/* ---- Sockets --------------------------------------------------------------------------------- */

typedef unsigned int GROUP;
/* A socket cannot be made from another's description here: pass NULL. */
typedef struct _WSAPROTOCOL_INFOA WSAPROTOCOL_INFOA, *LPWSAPROTOCOL_INFOA;
typedef struct _WSAPROTOCOL_INFOW WSAPROTOCOL_INFOW, *LPWSAPROTOCOL_INFOW;

#define WSA_FLAG_OVERLAPPED 0x01
#define WSA_FLAG_NO_HANDLE_INHERIT 0x80

SOCKET WSASocketA(int af, int type, int protocol, LPWSAPROTOCOL_INFOA lpProtocolInfo, GROUP g,
                  DWORD dwFlags);
SOCKET WSASocketW(int af, int type, int protocol, LPWSAPROTOCOL_INFOW lpProtocolInfo, GROUP g,
                  DWORD dwFlags);
#ifdef UNICODE
#define WSASocket WSASocketW
#define WSAPROTOCOL_INFO WSAPROTOCOL_INFOW
#define LPWSAPROTOCOL_INFO LPWSAPROTOCOL_INFOW
#else
#define WSASocket WSASocketA
#define WSAPROTOCOL_INFO WSAPROTOCOL_INFOA
#define LPWSAPROTOCOL_INFO LPWSAPROTOCOL_INFOA
#endif

int closesocket(SOCKET s);

/*
 * The socket functions have the names of the C library's, which report errors elsewhere and know
 * nothing of the overlapped attribute. These have their own, behind macros. To call the C library's
 * put its name in parentheses after an #undef.
 */
SOCKET carnet_winsock_socket(int af, int type, int protocol);
SOCKET carnet_winsock_accept(SOCKET s, struct sockaddr *addr, int *addrlen);
int carnet_winsock_bind(SOCKET s, const struct sockaddr *name, int namelen);
int carnet_winsock_listen(SOCKET s, int backlog);
int carnet_winsock_connect(SOCKET s, const struct sockaddr *name, int namelen);
int carnet_winsock_send(SOCKET s, const char *buf, int len, int flags);
int carnet_winsock_recv(SOCKET s, char *buf, int len, int flags);
int carnet_winsock_sendto(SOCKET s, const char *buf, int len, int flags, const struct sockaddr *to,
                          int tolen);
int carnet_winsock_recvfrom(SOCKET s, char *buf, int len, int flags, struct sockaddr *from,
                            int *fromlen);
int carnet_winsock_shutdown(SOCKET s, int how);
int carnet_winsock_setsockopt(SOCKET s, int level, int optname, const char *optval, int optlen);
int carnet_winsock_getsockopt(SOCKET s, int level, int optname, char *optval, int *optlen);
int carnet_winsock_getsockname(SOCKET s, struct sockaddr *name, int *namelen);
int carnet_winsock_getpeername(SOCKET s, struct sockaddr *name, int *namelen);

#define socket carnet_winsock_socket
#define accept carnet_winsock_accept
#define bind carnet_winsock_bind
#define listen carnet_winsock_listen
#define connect carnet_winsock_connect
#define send carnet_winsock_send
#define recv carnet_winsock_recv
#define sendto carnet_winsock_sendto
#define recvfrom carnet_winsock_recvfrom
#define shutdown carnet_winsock_shutdown
#define setsockopt carnet_winsock_setsockopt
#define getsockopt carnet_winsock_getsockopt
#define getsockname carnet_winsock_getsockname
#define getpeername carnet_winsock_getpeername

/* ---- select ---------------------------------------------------------------------------------- */

/* Windows' fd_set is an array of sockets, not of bits. */
#undef FD_SETSIZE
#define FD_SETSIZE CARNET_WINSOCK_FD_SETSIZE

typedef struct carnet_winsock_fd_set {
    u_int fd_count;
    SOCKET fd_array[FD_SETSIZE];
} carnet_winsock_fd_set;
#define fd_set carnet_winsock_fd_set
typedef carnet_winsock_fd_set FD_SET, *PFD_SET, *LPFD_SET;

int carnet_winsock_select(int nfds, fd_set *readfds, fd_set *writefds, fd_set *exceptfds,
                          const struct timeval *timeout);
#define select carnet_winsock_select

static inline void carnet_winsock_fd_add(SOCKET s, fd_set *set)
{
    u_int i;
    for (i = 0; i < set->fd_count; i++)
        if (set->fd_array[i] == s)
            return;
    if (set->fd_count < FD_SETSIZE)
        set->fd_array[set->fd_count++] = s;
}

static inline void carnet_winsock_fd_remove(SOCKET s, fd_set *set)
{
    u_int i;
    for (i = 0; i < set->fd_count && set->fd_array[i] != s; i++)
        ;
    if (i == set->fd_count)
        return;
    for (; i + 1 < set->fd_count; i++)
        set->fd_array[i] = set->fd_array[i + 1];
    set->fd_count--;
}

static inline int carnet_winsock_fd_in(SOCKET s, const fd_set *set)
{
    u_int i;
    for (i = 0; i < set->fd_count; i++)
        if (set->fd_array[i] == s)
            return 1;
    return 0;
}

#undef FD_ZERO
#undef FD_SET
#undef FD_CLR
#undef FD_ISSET
#define FD_ZERO(set) ((set)->fd_count = 0)
#define FD_SET(s, set) carnet_winsock_fd_add((SOCKET)(s), (set))
#define FD_CLR(s, set) carnet_winsock_fd_remove((SOCKET)(s), (set))
#define FD_ISSET(s, set) carnet_winsock_fd_in((SOCKET)(s), (set))

/* ---- Overlapped operations, events, waits ---------------------------------------------------- */

#define WSA_INVALID_EVENT ((WSAEVENT)NULL)
#define WSA_MAXIMUM_WAIT_EVENTS 64
#define WSA_WAIT_FAILED WAIT_FAILED
#define WSA_WAIT_EVENT_0 WAIT_OBJECT_0
#define WSA_WAIT_IO_COMPLETION WAIT_IO_COMPLETION
#define WSA_WAIT_TIMEOUT WAIT_TIMEOUT
#define WSA_INFINITE INFINITE

BOOL WSAGetOverlappedResult(SOCKET s, LPWSAOVERLAPPED lpOverlapped, LPDWORD lpcbTransfer,
                            BOOL fWait, LPDWORD lpdwFlags);

/* Events with manual reset. */
WSAEVENT WSACreateEvent(void);
BOOL WSASetEvent(WSAEVENT hEvent);
BOOL WSAResetEvent(WSAEVENT hEvent);
BOOL WSACloseEvent(WSAEVENT hEvent);
DWORD WSAWaitForMultipleEvents(DWORD cEvents, const WSAEVENT *lphEvents, BOOL fWaitAll,
                               DWORD dwTimeout, BOOL fAlertable);

/* Of Windows Sockets 1.1. Here: ends the calls of select, WSAIoctl and WSPIoctl in the process that
 * wait, with WSAEINTR; and says whether there are any. */
int WSACancelBlockingCall(void);
BOOL WSAIsBlocking(void);

/* ---- Messages -------------------------------------------------------------------------------- */

typedef struct _WSABUF {
    ULONG len;
    CHAR *buf;
} WSABUF, *LPWSABUF;

typedef struct _WSAMSG {
    LPSOCKADDR name;
    INT namelen;
    LPWSABUF lpBuffers;
    ULONG dwBufferCount;
    WSABUF Control;
    ULONG dwFlags;
} WSAMSG, *PWSAMSG, *LPWSAMSG;

typedef struct _WSACMSGHDR {
    SIZE_T cmsg_len;
    INT cmsg_level;
    INT cmsg_type;
} WSACMSGHDR, *PWSACMSGHDR, *LPWSACMSGHDR;

#define WSA_CMSGHDR_ALIGN(length) \
    (((length) + sizeof(SIZE_T) - 1) & ~(SIZE_T)(sizeof(SIZE_T) - 1))
#define WSA_CMSGDATA_ALIGN(length) WSA_CMSGHDR_ALIGN(length)
#define WSA_CMSG_FIRSTHDR(msg) \
    ((msg)->Control.len >= sizeof(WSACMSGHDR) ? (LPWSACMSGHDR)(void *)(msg)->Control.buf \
                                              : (LPWSACMSGHDR)NULL)
#define WSA_CMSG_NXTHDR(msg, cmsg) \
    ((cmsg) == NULL ? WSA_CMSG_FIRSTHDR(msg) \
     : ((CHAR *)(cmsg) + WSA_CMSGHDR_ALIGN((cmsg)->cmsg_len) + sizeof(WSACMSGHDR) > \
        (msg)->Control.buf + (msg)->Control.len) \
         ? (LPWSACMSGHDR)NULL \
         : (LPWSACMSGHDR)(void *)((CHAR *)(cmsg) + WSA_CMSGHDR_ALIGN((cmsg)->cmsg_len)))
#define WSA_CMSG_DATA(cmsg) ((UCHAR *)(cmsg) + WSA_CMSGDATA_ALIGN(sizeof(WSACMSGHDR)))
#define WSA_CMSG_SPACE(length) \
    (WSA_CMSGDATA_ALIGN(sizeof(WSACMSGHDR)) + WSA_CMSGHDR_ALIGN(length))
#define WSA_CMSG_LEN(length) (WSA_CMSGDATA_ALIGN(sizeof(WSACMSGHDR)) + (length))

int WSASendMsg(SOCKET Handle, LPWSAMSG lpMsg, DWORD dwFlags, LPDWORD lpNumberOfBytesSent,
               LPWSAOVERLAPPED lpOverlapped,
               LPWSAOVERLAPPED_COMPLETION_ROUTINE lpCompletionRoutine);

/* ---- Error codes ----------------------------------------------------------------------------- */

#define WSA_INVALID_HANDLE 6
#define WSA_NOT_ENOUGH_MEMORY 8
#define WSA_INVALID_PARAMETER 87
#define WSA_OPERATION_ABORTED 995
#define WSA_IO_INCOMPLETE 996
#define WSA_IO_PENDING 997
#define WSAEINTR 10004
#define WSAEBADF 10009
#define WSAEACCES 10013
#define WSAEFAULT 10014
#define WSAEINVAL 10022
#define WSAEMFILE 10024
#define WSAEWOULDBLOCK 10035
#define WSAEINPROGRESS 10036
#define WSAEALREADY 10037
#define WSAENOTSOCK 10038
#define WSAEDESTADDRREQ 10039
#define WSAEMSGSIZE 10040
#define WSAEPROTOTYPE 10041
#define WSAENOPROTOOPT 10042
#define WSAEPROTONOSUPPORT 10043
#define WSAESOCKTNOSUPPORT 10044
#define WSAEOPNOTSUPP 10045
#define WSAEPFNOSUPPORT 10046
#define WSAEAFNOSUPPORT 10047
#define WSAEADDRINUSE 10048
#define WSAEADDRNOTAVAIL 10049
#define WSAENETDOWN 10050
#define WSAENETUNREACH 10051
#define WSAENETRESET 10052
#define WSAECONNABORTED 10053
#define WSAECONNRESET 10054
#define WSAENOBUFS 10055
#define WSAEISCONN 10056
#define WSAENOTCONN 10057
#define WSAESHUTDOWN 10058
#define WSAETOOMANYREFS 10059
#define WSAETIMEDOUT 10060
#define WSAECONNREFUSED 10061
#define WSAELOOP 10062
#define WSAENAMETOOLONG 10063
#define WSAEHOSTDOWN 10064
#define WSAEHOSTUNREACH 10065
#define WSASYSNOTREADY 10091
#define WSAVERNOTSUPPORTED 10092
#define WSANOTINITIALISED 10093

#ifdef __cplusplus
}
#endif

#endif
