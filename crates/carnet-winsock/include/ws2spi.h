/*
 * The service provider's side of Windows Sockets 2.
 *
 * Carnet, https://github.com/carnet-project/carnet; MIT or Apache-2.0.
 */
#ifndef CARNET_WINSOCK_WS2SPI_H
#define CARNET_WINSOCK_WS2SPI_H

#include "winsock2.h"

#ifdef __cplusplus
extern "C" {
#endif

#define WSPAPI

/* What Internal of a WSAOVERLAPPED holds while the operation pends. */
#define WSS_OPERATION_IN_PROGRESS 0x00000103L

/* Names a thread; made by WPUOpenCurrentThread. */
typedef struct _WSATHREADID {
    HANDLE ThreadHandle;
    DWORD_PTR Reserved;
} WSATHREADID, *LPWSATHREADID;

typedef void(CALLBACK *LPWSAUSERAPC)(DWORD_PTR dwContext);

/* WSAIoctl, but the routine runs in the thread of lpThreadId (NULL: the caller's), of which a copy
 * is taken, and the error goes to *lpErrno alone. */
int WSPIoctl(SOCKET s, DWORD dwIoControlCode, LPVOID lpvInBuffer, DWORD cbInBuffer,
             LPVOID lpvOutBuffer, DWORD cbOutBuffer, LPDWORD lpcbBytesReturned,
             LPWSAOVERLAPPED lpOverlapped,
             LPWSAOVERLAPPED_COMPLETION_ROUTINE lpCompletionRoutine, LPWSATHREADID lpThreadId,
             LPINT lpErrno);

int WPUOpenCurrentThread(LPWSATHREADID lpThreadId, LPINT lpErrno);
int WPUCloseThread(LPWSATHREADID lpThreadId, LPINT lpErrno);
int WPUQueueApc(LPWSATHREADID lpThreadId, LPWSAUSERAPC lpfnUserApc, DWORD_PTR dwContext,
                LPINT lpErrno);
int WPUCompleteOverlappedRequest(SOCKET s, LPWSAOVERLAPPED lpOverlapped, DWORD dwError,
                                 DWORD cbTransferred, LPINT lpErrno);

#ifdef __cplusplus
}
#endif

#endif
